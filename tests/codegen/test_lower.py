"""Whole models under decisions drawn at random: any point of the space computes the plain model's step."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from autopar.api import arguments
from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.passes.capture import COMPUTE_DTYPE, capture
from autopar.passes.costs import OPTIMIZERS
from autopar.passes.decision import Context, Decision
from autopar.passes.modes import MODES
from autopar.passes.problem import Setting, build
from autopar.planner import prepare
from tests import builders
from tests.families import FAMILIES, family
from tests.simulator import Trial, assert_same, materials, simulated, step_of

SEED = 5
TOLERANCE = 1e-5
MESHES = (Mesh((2,)), Mesh((4,)), Mesh((2, 2)))


class Recurrent(nn.Module):
    """One block in turns with an op without a rule; its output also leaves as a view."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh())])
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.h[0](x).unflatten(1, (2, 4)).transpose(1, 2).cumsum(0).flatten(1) * self.scale
        return x


def recurrent() -> builders.Case:
    torch.manual_seed(0)
    return builders.Case(Recurrent(), (torch.randn(4, 8), torch.randint(0, 8, (4,))), F.cross_entropy)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model captured in float64, what it is run on and what its step comes to."""

    context: Context
    given: dict[str, Tensor]
    wanted: Trial


MODELS: dict[str, tuple[Callable[[], builders.Case], int]] = {
    "mlp": (builders.mlp, 6),
    "recurrent": (recurrent, 6),
    "gpt2": (partial(builders.gpt2, batch=4), 3),
    "gpt2 with dropout": (partial(builders.gpt2, dropout=0.2, batch=4), 3),
    "gpt2 of 97 words": (partial(builders.gpt2, vocab=97, batch=4), 1),
    "resnet": (partial(builders.resnet, size=32), 2),
    **{name: (partial(family, name), 1) for name in FAMILIES},
}
"""Each model with the number of decisions that are tried on a mesh."""
SLOWLY = 40
"""How many times as many the slow test tries."""


@cache
def subject(name: str) -> Subject:
    """Models that draw random numbers are compared with themselves whole on one device."""
    case = MODELS[name][0]()
    model = case.model.double()
    inputs = pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, case.inputs)
    context = prepare(capture(model, arguments(inputs), "fp64", case.loss_fn))  # type: ignore[arg-type]
    given = materials(context, model, inputs)
    if "dropout" in name:
        return Subject(context, given, simulated(next(decisions(context, Mesh((1,)), 1)), given, SEED))
    plain = copy.deepcopy(model)
    loss = builders.Case(plain, inputs, case.loss_fn).plain_loss(plain)
    return Subject(context, given, step_of(context, plain, loss))


def decisions(context: Context, mesh: Mesh, count: int, seed: int = 0, mode: str = "auto") -> Iterator[Decision]:
    """Choices drawn from the solver's own space."""
    setting = Setting(mesh, Cluster.preset(f"cpu:{mesh.size}"), MODES[mode], OPTIMIZERS["adamw"])
    problem, generator = build(context, setting), random.Random(seed)
    for _ in range(count):
        yield problem.decide(tuple(generator.randrange(len(node.choices)) for node in problem.instance.nodes))


def check(name: str, drawn: Iterator[Decision]) -> None:
    for number, decision in enumerate(drawn):
        try:
            assert_same(simulated(decision, subject(name).given, SEED), subject(name).wanted, TOLERANCE)
        except Exception as failure:
            stored = {node.name: str(storage) for node, storage in decision.storage.items()}
            said = f"decision {number}: {decision.assignments}, stored {stored}: {failure}"
            raise AssertionError(said) from failure


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPUTE_DTYPE, "fp64", torch.float64)


@pytest.mark.parametrize(("name", "mesh"), [
    pytest.param(name, mesh, marks=pytest.mark.slow if name in FAMILIES and mesh is not MESHES[-1] else ())
    for name, mesh in itertools.product(MODELS, MESHES)], ids=str)
def test_any_decision_computes_the_plain_step(name: str, mesh: Mesh) -> None:
    check(name, decisions(subject(name).context, mesh, MODELS[name][1]))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_any_of_many_decisions_computes_the_plain_step(name: str, mesh: Mesh) -> None:
    check(name, decisions(subject(name).context, mesh, SLOWLY * MODELS[name][1], seed=1))


SHAPES = {"ddp": (4,), "zero1": (4,), "zero2": (4,), "zero3": (4,), "1d": (4,), "sequence": (4,), "zero+1d": (2, 2),
          "2d": (2, 2), "2.5d": (2, 2, 2), "3d": (2, 2, 2)}


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
@pytest.mark.parametrize("mode", sorted(name for name, mode in MODES.items() if name != "auto" and not mode.staged))
def test_any_decision_of_a_mode_computes_the_plain_step(name: str, mode: str) -> None:
    check(name, decisions(subject(name).context, Mesh(SHAPES[mode]), 2, mode=mode))
