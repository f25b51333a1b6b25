"""Whole models under decisions drawn at random: any point of the space computes the plain model's step."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.api import arguments
from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.passes.capture import COMPUTE_DTYPE, capture
from autopar.passes.costs import OPTIMIZERS
from autopar.passes.decision import Context, Decision
from autopar.passes.problem import Setting, build
from autopar.passes.strategies import MODES
from autopar.planner import prepare
from tests import builders
from tests.simulator import Trial, assert_same, materials, simulated, step_of

SEED = 5


@dataclass(frozen=True, eq=False)
class Subject:
    """A model captured in float64, what it is run on and what its step comes to."""

    context: Context
    given: dict[str, Tensor]
    wanted: Trial


MODELS = {
    "mlp": builders.mlp,
    "gpt2": partial(builders.gpt2, batch=4),
    "gpt2 with dropout": partial(builders.gpt2, dropout=0.2, batch=4),
    "resnet": partial(builders.resnet, size=32),
}


@cache
def subject(name: str) -> Subject:
    """Models that draw random numbers are compared with themselves whole on one device."""
    case = MODELS[name]()
    model = case.model.double()
    inputs = pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, case.inputs)
    context = prepare(capture(model, arguments(inputs), "fp64", case.loss_fn))  # type: ignore[arg-type]
    given = materials(context, model, inputs)
    if "dropout" in name:
        return Subject(context, given, simulated(next(decisions(context, Mesh((1,)), 1)), given, SEED))
    plain = copy.deepcopy(model)
    return Subject(context, given, step_of(context, plain, builders.Case(plain, inputs, case.loss_fn).plain_loss(plain)))


def decisions(context: Context, mesh: Mesh, count: int):
    setting = Setting(mesh, Cluster.preset(f"cpu:{mesh.size}"), MODES["auto"], OPTIMIZERS["adamw"])
    problem, generator = build(context, setting), random.Random(0)
    for _ in range(count):
        yield problem.decide(tuple(generator.randrange(len(node.choices)) for node in problem.instance.nodes))


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPUTE_DTYPE, "fp64", torch.float64)


@pytest.mark.parametrize("mesh", [Mesh((2,)), Mesh((4,)), Mesh((2, 2))], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_any_decision_computes_the_plain_step(name: str, mesh: Mesh) -> None:
    for number, decision in enumerate(decisions(subject(name).context, mesh, 40)):
        try:
            assert_same(simulated(decision, subject(name).given, SEED), subject(name).wanted, 1e-5)
        except Exception as failure:
            raise AssertionError(f"decision {number} {decision.assignments}, stored "
                                 f"{ {n.name: str(s) for n, s in decision.storage.items()} }: {failure}") from failure
