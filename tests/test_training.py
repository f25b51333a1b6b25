"""Whole training loops: compiled at the first call, dropout included, the same on any number of ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import autopar
from tests.builders import CASES, gpt2, quick

pytestmark = pytest.mark.dist
STEPS, RATE = 4, 1e-3


def curve(rank: int, world_size: int, mode: str, dropout: float, local: bool) -> list[float]:
    """Losses and gradient norms of some steps and the loss in eval mode, of a model compiled at its first call."""
    case = gpt2(dropout=dropout)
    torch.manual_seed(5)
    model = autopar.compile(case.model, quick(world_size), mode=mode, precision="fp32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)  # before anything is known of the plan
    inputs = case.part(rank, world_size) if local else None
    found = []
    for _ in range(STEPS):
        loss = case.call(model, inputs)
        loss.backward()
        found += [float(loss.detach()), float(model.clip_grad_norm_(1.0))]
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return [*found, float(case.call(model, inputs))]


def plain_curve(dropout: float) -> list[float]:
    """The same loop on the plain model."""
    case = gpt2(dropout=dropout)
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=RATE)
    found = []
    for _ in range(STEPS):
        loss = case.call(case.model)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1.0)
        found += [float(loss.detach()), float(norm)]
        optimizer.step()
        optimizer.zero_grad()
    case.model.eval()
    with torch.no_grad():
        return [*found, float(case.call(case.model))]


MODES = [("ddp", False), ("zero3", True), ("1d", False), ("auto", True)]


@pytest.mark.parametrize(("mode", "local"), MODES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_training_is_the_plain_models(pool: Any, world_size: int, mode: str, local: bool) -> None:
    for found in pool(world_size).run(curve, mode, 0.0, local):
        assert found == pytest.approx(plain_curve(0.0), abs=2e-5)


@pytest.mark.parametrize(("mode", "local"), MODES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_dropout_does_not_depend_on_the_plan(pool: Any, world_size: int, mode: str, local: bool) -> None:
    for found in pool(world_size).run(curve, mode, 0.1, local):
        assert found == pytest.approx(on_two_ranks(pool), abs=2e-5)


@cache
def on_two_ranks(pool: Any) -> list[float]:
    """The curve with dropout that all others have to follow."""
    return pool(2).run(curve, "ddp", 0.1, False)[0]


def refused(rank: int, world_size: int, trouble: str) -> str:
    """What each rank is told when the call does not fit."""
    case = CASES["gpt2"]()
    inputs = dict(case.inputs)
    if trouble == "mode":
        return message(lambda: autopar.compile(case.model, quick(world_size), inputs=inputs, mode="4d"))
    if trouble == "cluster":
        return message(lambda: autopar.compile(case.model, "cpu:8", inputs=inputs))
    if trouble == "batch":
        odd = CASES["resnet"](batch=6)  # whose batch norm mixes samples, so that none can be added
        return message(lambda: autopar.compile(odd.model, quick(world_size), inputs=odd.inputs, loss_fn=odd.loss_fn,
                                               mode="ddp"))
    if trouble == "models":
        other = gpt2(layers=2 + rank)
        return message(lambda: autopar.compile(other.model, quick(world_size), inputs=inputs))
    model = autopar.compile(case.model, quick(world_size), inputs=inputs, mode="ddp", precision="fp32")
    given = {"shapes": {name: x.repeat(1, 3) for name, x in inputs.items()},
             "data": {name: (x + rank) % 96 for name, x in inputs.items()},
             "arguments": {"input_ids": inputs["input_ids"]}}[trouble]
    return message(lambda: model(**given))


def message(call: Any) -> str:
    """The one line that `call` is refused with."""
    try:
        call()
    except autopar.AutoparError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(("trouble", "words"), [
    ("mode", ["4d", "ddp", "zero3"]), ("cluster", ["8 devices", "4 ranks"]), ("batch", ["6", "4", "8"]),
    ("models", ["h.2.", "absent on rank 0"]), ("shapes", ["(8, 48)", "(8, 16)", "rows 0 to 31"]),
    ("data", ["data", "differ"]),
    ("arguments", ["input_ids", "labels"]),
])
def test_bad_calls_are_refused_on_every_rank(pool: Any, trouble: str, words: list[str]) -> None:
    for said in pool(4).run(refused, trouble):
        assert all(word in said for word in words), said
        assert "\n" not in said
