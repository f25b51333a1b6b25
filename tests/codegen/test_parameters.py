"""Parameters at rest on real ranks: plain names and shapes go out and come in, however they are stored."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import autopar
from autopar.api import arguments
from autopar.codegen.runtime import ParallelModule
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh
from autopar.passes.capture import capture
from autopar.passes.costs import OPTIMIZERS
from autopar.passes.modes import MODES
from autopar.passes.problem import Setting, build
from autopar.plan import Plan
from autopar.planner import Request, planned_ops, planned_parameters, prepare, solve
from tests import builders
from tests.pool import Pool

pytestmark = pytest.mark.dist
Pools = Callable[[int], Pool]
TOLERANCE = 1e-4
FLOOR = 1e-3
TIED = {"transformer.wte.weight", "lm_head.weight"}


def case_called(name: str) -> builders.Case:
    return builders.resnet(size=32) if name == "resnet" else builders.CASES[name]()


def any_plan(case: builders.Case, mesh: tuple[int, ...], seed: int) -> Plan:
    """A plan whose every choice is drawn from the solver's space; its claims are another's."""
    context = prepare(capture(case.model, arguments(case.inputs), "fp32", case.loss_fn))
    where = builders.quick(Mesh(mesh).size)
    claimed, _ = solve(context, where, Request("m", "ddp", (where.size,)))
    problem = build(context, Setting(Mesh(mesh), where, MODES["auto"], OPTIMIZERS["adamw"]))
    generator = random.Random(seed)
    decision = problem.decide(tuple(generator.randrange(len(node.choices)) for node in problem.instance.nodes))
    return dataclasses.replace(claimed, mesh=mesh, mode="auto", ops=planned_ops(decision),
                               parameters=planned_parameters(decision))


def compiled(case: builders.Case, world_size: int, **options: Any) -> ParallelModule:
    model = autopar.compile(case.model, builders.quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn,
                            precision="fp32", **options)
    assert isinstance(model, ParallelModule)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_state(model: ParallelModule, plain: nn.Module) -> None:
    """Names, shapes and values go out as the plain model's, others come in, and what does not fit is refused."""
    expected = plain.state_dict()
    state = model.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        assert value.shape == expected[name].shape, name
        assert torch.equal(whole(value), expected[name]), name
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in plain.named_parameters()}
    for step, wrap in ((1, dict), (2, lambda values: {n: like(v, state[n]) for n, v in values.items()})):
        fresh = {n: v + step if v.is_floating_point() else v for n, v in expected.items()}
        found = model.load_state_dict(wrap(fresh))
        assert (found.missing_keys, found.unexpected_keys) == ([], [])
        assert all(torch.equal(whole(v), fresh[n]) for n, v in model.state_dict().items())
    check_refusals(model, expected)


def like(value: Tensor, state: Tensor) -> Tensor:
    """`value` laid out as `state` is."""
    if not isinstance(state, DTensor):
        return value
    return torch.distributed.tensor.distribute_tensor(value, state.device_mesh, state.placements, src_data_rank=None)


def check_refusals(model: ParallelModule, expected: dict[str, Tensor]) -> None:
    before = {n: whole(v).clone() for n, v in model.state_dict().items()}
    alone = {n for n, v in expected.items() if v.ndim == 2} - TIED
    name = min(alone)
    changes: list[tuple[dict[str, Any], str]] = [({name: expected[name].t()[:-1]}, f"{name} has shape"),
                                                 ({"more": torch.ones(1)}, "unexpected"), ({name: None}, "missing")]
    for change, said in changes:
        changed = {n: v for n, v in {**expected, **change}.items() if v is not None}
        with pytest.raises(AutoparError, match=said):
            model.load_state_dict(changed)
        assert all(torch.equal(whole(v), before[n]) for n, v in model.state_dict().items()), "half loaded"
    model.load_state_dict({n: v for n, v in expected.items() if n != "lm_head.weight"})
    loaded = model.load_state_dict({name: expected[name], "more": torch.ones(1)}, strict=False)
    assert loaded.unexpected_keys == ["more"]
    assert name not in loaded.missing_keys
    assert torch.equal(whole(model.state_dict()[name]), expected[name])


def check_mode(rank: int, world_size: int, name: str, mode: str, mesh: tuple[int, ...] | None) -> None:
    case = case_called(name)
    plain = copy.deepcopy(case.model)
    check_state(compiled(case, world_size, mode=mode, mesh=mesh), plain)


@pytest.mark.parametrize(("name", "world_size", "mode", "mesh"), [
    ("gpt2", 2, "zero3", None), ("gpt2", 2, "ddp", None), ("gpt2", 4, "auto", (2, 2)), ("gpt2", 4, "1d", None),
    ("resnet", 2, "auto", None), ("mlp", 4, "auto", (2, 2)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("gpt2", 2, "auto", None), ("gpt2", 2, "1d", None), ("gpt2", 4, "zero3", None), ("resnet", 4, "zero3", None))),
])
def test_state_in_every_mode(pool: Pools, name: str, world_size: int, mode: str, mesh: tuple[int, ...] | None) -> None:
    pool(world_size).run(check_mode, name, mode, mesh)


def check_plan(rank: int, world_size: int, name: str, plan: Plan) -> None:
    """The state, then a step, whose gradients are the plain model's."""
    case = case_called(name)
    plain = copy.deepcopy(case.model)
    model = compiled(case, world_size, plan=plan)
    check_state(model, plain)
    loss = case.call(model)
    expected = case.plain_loss(plain)
    loss.backward()
    expected.backward()
    assert abs(float(loss.detach() - expected.detach())) <= TOLERANCE
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    largest = max(float(g.abs().max()) for g in gradients.values() if g is not None)
    for n, parameter in model.named_parameters():
        found, wanted = whole(parameter.grad), gradients[n]
        assert wanted is not None
        error = float((found.reshape(wanted.shape) - wanted).abs().max())
        assert error <= TOLERANCE * max(float(wanted.abs().max()), FLOOR * largest), f"{n} is off by {error}"


@pytest.mark.parametrize(("name", "mesh", "seed"), [
    ("gpt2", (2,), 0), ("gpt2", (2, 2), 1), ("resnet", (2, 2), 0), ("mlp", (2, 2), 0),
    *(pytest.param("gpt2", mesh, 0, marks=pytest.mark.slow) for mesh in ((2, 2), (4,))),
    *(pytest.param(name, mesh, seed, marks=pytest.mark.slow) for name in ("gpt2", "resnet", "mlp")
      for mesh in ((2,), (4,), (2, 2)) for seed in range(2, 6)),
])
def test_any_plan_runs_on_real_ranks(pool: Pools, name: str, mesh: tuple[int, ...], seed: int) -> None:
    """Any mixture of whole, sharded, gathered and unflattened parameters."""
    pool(Mesh(mesh).size).run(check_plan, name, any_plan(case_called(name), mesh, seed))


class Table(nn.Module):
    """A frozen weight, and a table that its state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("table", torch.arange(8.0), persistent=False)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.scale + self.table)


def check_table(rank: int, world_size: int, mode: str) -> None:
    torch.manual_seed(0)
    case = builders.Case(Table(), (torch.randn(8, 8), torch.randint(0, 8, (8,))), F.cross_entropy)
    plain = copy.deepcopy(case.model)
    model = compiled(case, world_size, mode=mode)
    check_state(model, plain)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"first.weight", "first.bias"}


@pytest.mark.parametrize("mode", ["auto", "zero3"])
def test_what_the_plain_state_leaves_out_is_left_out(pool: Pools, mode: str) -> None:
    pool(2).run(check_table, mode)


def seeds(rank: int, world_size: int) -> dict[str, int]:
    torch.manual_seed(rank)
    return compiled(builders.mlp(), world_size, mode="1d").random_state()


def test_all_ranks_draw_dropout_from_one_seed(pool: Pools) -> None:
    first, second = pool(2).run(seeds)
    assert first == second


def frozen(rank: int, world_size: int, mode: str) -> list[float]:
    """Gradient errors of a model some parameters of which are not trained."""
    case = builders.mlp()
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(name not in ("0.0.weight", "0.0.bias", "1.2.bias"))
    plain = copy.deepcopy(case.model)
    case.plain_loss(plain).backward()
    model = compiled(case, world_size, mode=mode)
    case.call(model).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {name for name, grad in grads.items() if grad is None} == {"0.0.weight", "0.0.bias", "1.2.bias"}
    return [float((whole(grads[name]) - parameter.grad).abs().max()) for name, parameter in plain.named_parameters()
            if parameter.grad is not None]


@pytest.mark.parametrize("mode", ["ddp", "1d"])
def test_parameters_that_are_not_trained(pool: Pools, mode: str) -> None:
    assert max(max(errors) for errors in pool(2).run(frozen, mode)) <= 1e-6
