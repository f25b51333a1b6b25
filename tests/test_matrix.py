"""Every mode on every family: loss, gradients, and twenty steps of AdamW are the plain model's in one process.

The whole matrix is slow; a diagonal, each family and each mode at least once, is not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.api import arguments
from autopar.core.cluster import Cluster
from autopar.passes.capture import capture
from autopar.planner import Request, decision_of, prepare, solve
from tests.builders import CASES, Case, gpt2, quick
from tests.families import family
from tests.simulator import assert_same, materials, simulated, step_of
from tests.test_exactness import gradient_errors, whole

NAMES = ["gpt2", "opt", "bert", "llama", "t5", "vit", "resnet", "swin"]
MODES = ["auto", "ddp", "zero1", "zero2", "zero3", "1d", "sequence", "zero+1d", "2d"]
MESHES = {("2d", 4): (2, 2), ("zero+1d", 4): (2, 2)}
REFUSED = {("2d", 2): "mode 2d wants q x q devices", ("zero+1d", 2): "mode zero+1d wants two axes"}
"""What can't be, by mode and ranks, and what is said of it."""
STEPS, RATE = 20, 1e-3
TOLERANCE = 1e-5
DRIFT = 0.2
"""Of a learning rate: how far a parameter may be off after all steps."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a mode made of a model: errors of the first loss, of gradients, of the curve, of parameters in learning
    rates; or what it was refused with."""

    loss: float = 0.0
    gradients: float = 0.0
    curve: float = 0.0
    drift: float = 0.0
    refusal: str = ""


OPTIONS: dict[str, dict[str, Any]] = {"resnet": {"size": 32}}
"""Images whose training rounding moves little: with weights off by 1e-7 of themselves the plain model ends within 0.12
learning rates of itself, and on images of 48 within 2.7."""


def case_of(name: str) -> Case:
    return CASES[name](**OPTIONS.get(name, {})) if name in CASES else family(name)


def trained(case: Case, model: nn.Module, loss_of: Any) -> list[float]:
    """The losses of all steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    found = []
    for _ in range(STEPS):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def trial(rank: int, world_size: int, name: str, mode: str) -> Trial:
    """One cell of the matrix."""
    case = case_of(name)
    plain = copy.deepcopy(case.model)
    try:
        model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn, mode=mode,
                                mesh=MESHES.get((mode, world_size)), precision="fp32", solver="highs")
    except autopar.AutoparError as error:
        return Trial(refusal=str(error))
    wanted, found = case.plain_loss(plain), case.call(model)
    wanted.backward(), found.backward()
    gradients = max(gradient_errors(model, plain).values())
    plain.zero_grad(), model.zero_grad()
    curves = trained(case, plain, lambda: case.plain_loss(plain)), trained(case, model, lambda: case.call(model))
    after, held = plain.state_dict(), model.state_dict()
    drift = max(float((whole(held[n]) - p.detach()).abs().max()) for n, p in plain.named_parameters())
    assert after.keys() == held.keys()
    return Trial(abs(float(found.detach()) - float(wanted.detach())), gradients,
                 max(abs(a - b) for a, b in zip(*curves, strict=True)), drift / RATE)


def check(pool: Any, name: str, mode: str, world_size: int) -> None:
    wanted = REFUSED.get((mode, world_size))
    for found in pool(world_size).run(trial, name, mode):
        if wanted is not None:
            assert wanted in found.refusal
            continue
        assert not found.refusal
        assert max(found.loss, found.gradients, found.curve) <= TOLERANCE and found.drift <= DRIFT, found


DIAGONAL = [("gpt2", "2d", 4), ("opt", "zero+1d", 4), ("bert", "sequence", 2), ("llama", "auto", 2), ("t5", "1d", 2),
            ("vit", "zero3", 2), ("resnet", "ddp", 2), ("swin", "zero2", 2), ("gpt2", "zero1", 2)]


@pytest.mark.dist
@pytest.mark.parametrize(("name", "mode", "world_size"), DIAGONAL)
def test_a_diagonal(pool: Any, name: str, mode: str, world_size: int) -> None:
    check(pool, name, mode, world_size)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_mode_on_every_family(pool: Any, name: str, world_size: int, mode: str) -> None:
    if (name, mode, world_size) not in DIAGONAL:
        check(pool, name, mode, world_size)


def with_dropout(rank: int, world_size: int, mode: str) -> list[float]:
    case = gpt2(dropout=0.1)
    torch.manual_seed(5)
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, mode=mode, precision="fp32",
                            mesh=MESHES.get((mode, world_size)))
    return trained(case, model, lambda: case.call(model))


@cache
def alone(pool: Any) -> list[float]:
    """The curve with dropout on one rank."""
    found: list[float] = pool(1).run(with_dropout, "ddp")[0]
    return found


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_dropout_draws_the_same_everywhere(pool: Any, world_size: int, mode: str) -> None:
    if (mode, world_size) in REFUSED:
        return
    for found in pool(world_size).run(with_dropout, mode):
        assert found == pytest.approx(alone(pool), abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["2.5d", "3d"])
@pytest.mark.parametrize("name", NAMES)
def test_three_axes_on_eight_simulated_ranks(name: str, mode: str) -> None:
    case = case_of(name)
    context = prepare(capture(case.model, arguments(case.inputs), "fp32", case.loss_fn))
    plan, _ = solve(context, Cluster.preset("cpu:8"), Request(name, mode, mesh=(2, 2, 2), solver="highs"))
    given = {n: x.clone() for n, x in materials(context, case.model, case.inputs).items()}
    wanted = step_of(context, case.model, case.plain_loss(case.model))
    assert_same(simulated(decision_of(plan, context), given), wanted, TOLERANCE)
