"""A compiled model in eval mode, between training steps and from the start, against the plain model doing the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from tests.builders import CASES, quick

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
OPTIONS: dict[str, dict[str, Any]] = {"gpt2": {}, "resnet": {"size": 64}, "mlp": {}}
RUNS = [("gpt2", "zero3", None, 4, False), ("gpt2", "1d", None, 2, True), ("resnet", "ddp", None, 2, True),
        ("resnet", "zero3", None, 4, False), ("resnet", "1d", None, 2, False), ("mlp", "auto", (2, 2), 4, False)]


def losses(model: nn.Module, call: Callable[[], Tensor], evaluate_first: bool) -> list[float]:
    """Of a loop that trains and evaluates by turns."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for turn in range(6):
        training = (turn % 2 == 0) != evaluate_first
        model.train(training)
        with torch.set_grad_enabled(training):
            loss = call()
        found.append(float(loss.detach()))
        if training:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return found


def both(rank: int, world_size: int, name: str, mode: str, mesh: Any, local: bool,
         evaluate_first: bool) -> tuple[list[float], list[float]]:
    """The losses of the compiled model and of the plain one."""
    case = CASES[name](**OPTIONS[name])
    plain = copy.deepcopy(case.model)
    model = autopar.compile(case.model.train(not evaluate_first), quick(world_size), inputs=case.inputs,
                            loss_fn=case.loss_fn, mode=mode, mesh=mesh, precision="fp32")
    given = case.part(rank, world_size) if local else None
    return (losses(model, lambda: case.call(model, given), evaluate_first),
            losses(plain, lambda: case.plain_loss(plain), evaluate_first))


@pytest.mark.parametrize(("name", "mode", "mesh", "world_size", "local"), RUNS)
def test_evaluation_between_steps(pool: Any, name: str, mode: str, mesh: Any, world_size: int, local: bool) -> None:
    for found, expected in pool(world_size).run(both, name, mode, mesh, local, False):
        assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_compiled_in_eval_mode(pool: Any, name: str) -> None:
    for found, expected in pool(2).run(both, name, "zero3", None, False, True):
        assert found == pytest.approx(expected, abs=TOLERANCE)
