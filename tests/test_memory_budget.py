"""A budget that forces recomputation: the same loss and gradients, dropout on, and what is kept is what was planned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.core.errors import Infeasible
from autopar.plan import Plan
from tests.builders import Case, gpt2, quick, resnet
from tests.test_exactness import TOLERANCE, whole

pytestmark = pytest.mark.dist
CASES: dict[str, Any] = {"gpt2 with dropout": lambda: gpt2(dropout=0.1, layers=3), "resnet": resnet}


def planned(case: Case, world_size: int, **options: Any) -> Plan:
    """The plan of a case."""
    return autopar.plan(case.model, quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn, precision="fp32",
                        **options)


def least(case: Case, world_size: int, options: dict[str, Any]) -> float:
    """The least budget, in bytes."""
    with pytest.raises(Infeasible) as refused:
        planned(case, world_size, memory_budget=1.0, **options)
    assert refused.value.least_budget_bytes is not None
    return refused.value.least_budget_bytes


def identity(x: Tensor) -> int:
    """Of the storage, whose memory may come and go."""
    return x.untyped_storage()._cdata


class Holding:
    """Counts bytes of distinct tensors that are saved for the backward, those of `known` ones aside."""

    def __init__(self, known: set[int]) -> None:
        self.known = known
        self.seen: list[Tensor] = []

    def pack(self, x: Tensor) -> Tensor:
        """Notes a saved tensor."""
        place = identity(x)
        seed = x.dtype == torch.int64 and not x.ndim
        if place not in self.known and not seed:
            self.known.add(place)
            self.seen.append(x)
        return x

    def nbytes(self, model: Any) -> int:
        """Bytes that are held now, of gathered parameters none: those that the backward begins with are still here."""
        units = model._parameters_at.units.values()
        gathered = {identity(whole) for unit in units for whole in unit.wholes.values()}
        return sum(x.untyped_storage().nbytes() for x in self.seen if identity(x) not in gathered)


def step(case: Case, model: nn.Module) -> tuple[float, dict[str, Tensor], dict[str, Tensor], int]:
    """(loss, gradients, buffers, bytes held for the backward) of a step, after one in which constants come to be."""
    case.call(model).backward()
    model.zero_grad()
    call = case.inputs
    constants = [c for program in model._site.constants.values() for c in program.values()]
    leaves = [*constants, *(call.values() if isinstance(call, dict) else call), *model.buffers(),
              *(p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())]
    holding = Holding(set(map(identity, leaves)))
    with torch.autograd.graph.saved_tensors_hooks(holding.pack, lambda x: x):
        loss = case.call(model)
    nbytes = holding.nbytes(model)
    loss.backward()
    grads = {n: whole(p.grad) for n, p in model.named_parameters()}
    return float(loss.detach()), grads, {n: b.clone() for n, b in model.named_buffers()}, nbytes


def budgeted(rank: int, world_size: int, name: str, budget: float,
             options: dict[str, Any]) -> tuple[float, float, int, Plan]:
    """(loss error, worst gradient error, bytes held, plan) of a step within the budget, beside one without."""
    found = []
    for given in ({}, {"memory_budget": budget}):
        case = CASES[name]()
        torch.manual_seed(5)
        model = autopar.compile(copy.deepcopy(case.model), quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn,
                                precision="fp32", **options, **given)
        found.append((*step(case, model), model.plan))
    (loss, expected, before, *_), (other, gradients, after, nbytes, plan) = found
    for n, b in before.items():
        torch.testing.assert_close(after[n], b, rtol=1e-5, atol=1e-6, msg=f"{n} is updated otherwise")
    largest = max(float(g.abs().max()) for g in expected.values())
    worst = max(float((gradients[n] - g).abs().max()) / max(float(g.abs().max()), 1e-3 * largest)
                for n, g in expected.items())
    return abs(loss - other), worst, nbytes, plan


@pytest.mark.parametrize(("name", "world_size", "options"), [
    ("gpt2 with dropout", 2, {"mode": "zero3"}), ("resnet", 1, {}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("gpt2 with dropout", 1, {}), ("gpt2 with dropout", 2, {"mode": "1d"}), ("resnet", 2, {"mode": "ddp"}))),
], ids=str)
@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_step_within_a_budget_is_the_same(pool: Any, name: str, world_size: int, options: dict[str, Any],
                                            share: float) -> None:
    case = CASES[name]()
    floor = least(case, world_size, options)
    free = planned(case, world_size, memory_budget=1e15, **options).memory.device if share else floor
    budget = floor + share * (free - floor) + 1.0
    for loss_error, gradient_error, nbytes, plan in pool(world_size).run(budgeted, name, budget, options):
        assert plan.checkpoints, "the budget forces nothing"
        assert plan.memory.device <= budget
        assert loss_error <= TOLERANCE
        assert gradient_error <= TOLERANCE
        assert nbytes == sum(c.saved * len(c.segments) for c in plan.checkpoints), plan.checkpoints
