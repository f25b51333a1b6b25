"""Reshards on real ranks against what specs mean for the whole tensor, forward and backward.

A laid-out tensor is kept here as one tensor of shape (mesh shape …, local shape …): cell by cell what each rank has.
Values are small integers, so that sums are exact in every dtype and compared with `==`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from functorch.compile import aot_function, nop  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.codegen.collectives import ReduceGradients, Reshard
from autopar.codegen.communicator import Communicator, connect
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh
from autopar.core.reshard import Cargo, Path, Primitive, Step, cheapest_path
from autopar.core.spec import State, from_states
from tests.pool import Pool

pytestmark = pytest.mark.dist

Pools = Callable[[int], Pool]
States = tuple[State, ...]
WHOLE = (4, 4, 8)
STATES: States = (0, 1, 2, "R", "P", "G")
DUAL: dict[State, State] = {"R": "R", "P": "R", "G": "P"}
LINE2, LINE4, SQUARE = Mesh((2,)), Mesh((4,)), Mesh((2, 2))


def price(primitive: Primitive, axes: tuple[int, ...], nbytes: float) -> float:
    return nbytes * len(axes)


def path(source: States, target: States, mesh: Mesh, differentiable: bool = True) -> Path:
    ends = from_states(source, len(WHOLE)), from_states(target, len(WHOLE))
    return cheapest_path(*ends, mesh, Cargo(1.0, differentiable), price)


def gradient(states: States) -> States:
    return tuple(DUAL.get(state, state) for state in states)


def random_whole(seed: int, dtype: torch.dtype, *leading: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (*leading, *WHOLE), generator=generator).to(dtype)


def shard(cells: Tensor, states: States, mesh: Mesh) -> Tensor:
    """Of `cells` that hold wholes, the parts that sharding axes leave; lower axes cut first."""
    for axis, state in enumerate(states):
        if isinstance(state, int):
            parts = cells.unbind(axis)
            dim = state + len(mesh.shape) - 1
            cells = torch.stack([part.chunk(mesh.shape[axis], dim)[i] for i, part in enumerate(parts)], axis)
    return cells


def lay_out(whole: Tensor, states: States, mesh: Mesh, seed: int) -> Tensor:
    """Every rank's part of `whole`: random along partial axes, summing to it."""
    partial = [axis for axis, state in enumerate(states) if state == "P"]
    counts = [mesh.shape[axis] if axis in partial else 1 for axis in mesh.axes]
    parts = random_whole(seed, whole.dtype, *counts)
    parts[(0,) * len(counts)] += whole - parts.sum(tuple(mesh.axes))
    return shard(parts.expand(*mesh.shape, *whole.shape), states, mesh)


def recombined(cells: Tensor, states: States) -> Tensor:
    """`cells` with partial axes summed, on every cell."""
    partial = [axis for axis, state in enumerate(states) if state == "P"]
    return cells.sum(partial, keepdim=True).expand_as(cells) if partial else cells


def same(cells: Tensor, whole: Tensor, states: States, mesh: Mesh) -> bool:
    expected = shard(whole.expand(*mesh.shape, *whole.shape), states, mesh)
    return cells.dtype == whole.dtype and torch.equal(recombined(cells, states), expected)


def of_rank(cells: Tensor, mesh: Mesh, rank: int) -> Tensor:
    return cells[mesh.coordinate(rank)].clone()


def gather_cells(by_rank: list[Tensor], mesh: Mesh) -> Tensor:
    return torch.stack([by_rank[device] for device in mesh.devices]).view(*mesh.shape, *by_rank[0].shape)


@lru_cache
def connected(mesh: Mesh) -> Communicator:
    return connect(mesh)


def build(source: States, target: States, mesh: Mesh, dtype: torch.dtype) -> Reshard:
    """Into a shape of two dims, so that the last view is seen to work."""
    local = tuple(shard(torch.empty(*mesh.shape, *WHOLE), source, mesh).shape[len(mesh.shape):])
    after = shard(torch.empty(*mesh.shape, *WHOLE), target, mesh).shape[len(mesh.shape):]
    steps = path(source, target, mesh, dtype.is_floating_point).steps
    return Reshard(steps, local, (after[0], after[1] * after[2]), dtype, connected(mesh))


def local_after(x: Tensor, states: States, mesh: Mesh) -> Tensor:
    return x.view(shard(torch.empty(*mesh.shape, *WHOLE), states, mesh).shape[len(mesh.shape):])


def reshard_all(rank: int, world: int, mesh: Mesh, source: States, targets: list[States],
                dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(output, gradient of the input) of this rank for each target."""
    found = []
    for target in targets:
        reshard = build(source, target, mesh, dtype)
        x = of_rank(lay_out(random_whole(0, dtype), source, mesh, 1), mesh, rank).requires_grad_()
        y = local_after(reshard(x.flatten()), target, mesh)
        y.backward(of_rank(lay_out(random_whole(2, dtype), gradient(target), mesh, 3), mesh, rank))
        assert y.is_contiguous() and x.grad is not None
        found.append((y.detach(), x.grad))
    return found


def wrong_pairs(pool: Pool, mesh: Mesh, source: States, dtype: torch.dtype) -> list[str]:
    """The pairs from `source` whose value or gradient came out wrong, by name."""
    targets = list(itertools.product(STATES, repeat=len(mesh.shape)))
    ranks = pool.run(reshard_all, mesh, source, targets, dtype)
    wrong = []
    for i, target in enumerate(targets):
        value, grad = (gather_cells([rank[i][k] for rank in ranks], mesh) for k in range(2))
        if not same(value, random_whole(0, dtype), target, mesh):
            wrong.append(f"{source} -> {target} value")
        if not same(grad, random_whole(2, dtype), gradient(source), mesh):
            wrong.append(f"{source} -> {target} gradient")
    return wrong


LINES = [LINE2, LINE4, Mesh((4,), (2, 0, 3, 1))]
SOURCES: list[States] = list(itertools.product(STATES, repeat=2))
SOME: list[States] = [(0, 0), (1, 2), ("R", "R"), ("P", "P"), ("P", 0), (1, "P"), ("G", 1), (2, "G")]
SQUARES = [(SQUARE, SOURCES), (Mesh((2, 2), (2, 1, 0, 3)), SOME), (Mesh((1, 2)), SOME), (Mesh((2, 1)), SOME)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mesh", LINES, ids=lambda mesh: str(mesh.devices))
def test_every_pair_of_states_of_one_axis(pool: Pools, mesh: Mesh, dtype: torch.dtype) -> None:
    for source in STATES:
        assert wrong_pairs(pool(mesh.size), mesh, (source,), dtype) == []


def test_pairs_of_one_axis_take_one_step() -> None:
    """So that the table above sees every step there is, and not detours around it."""
    for source, target in itertools.product(STATES, repeat=2):
        assert len(path((source,), (target,), LINE4).steps) == (source != target)


@pytest.mark.parametrize("mesh, source", [(mesh, source) for mesh, sources in SQUARES for source in sources],
                         ids=lambda value: f"{value} {value.devices}" if isinstance(value, Mesh) else str(value))
def test_every_pair_of_states_of_two_axes(pool: Pools, mesh: Mesh, source: States) -> None:
    assert wrong_pairs(pool(mesh.size), mesh, source, torch.float32) == []


def reshard_plain(rank: int, world: int, mesh: Mesh, source: States, target: States, whole: Tensor) -> Tensor:
    cells = shard(whole.expand(*mesh.shape, *WHOLE), source, mesh)
    return local_after(build(source, target, mesh, whole.dtype)(of_rank(cells, mesh, rank)), target, mesh)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("source, target", list(itertools.permutations((0, 1, 2, "R"), 2)), ids=str)
def test_tensors_without_gradient(pool: Pools, source: State, target: State, dtype: torch.dtype) -> None:
    whole = random_whole(4, torch.int64).to(dtype)
    cells = gather_cells(pool(4).run(reshard_plain, LINE4, (source,), (target,), whole), LINE4)
    assert same(cells, whole, (target,), LINE4)


@pytest.mark.parametrize("target", [1, "R"])
def test_partial_booleans_are_set_where_any_is(pool: Pools, target: State) -> None:
    cells = gather_cells(pool(4).run(any_of, target), LINE4)
    parts = torch.stack([random_whole(rank, torch.int64) > 0 for rank in range(4)])
    assert same(cells.view(torch.uint8), parts.any(0).view(torch.uint8), (target,), LINE4), "bytes are 0 or 1"


def any_of(rank: int, world: int, target: State) -> Tensor:
    reshard = build(("P",), (target,), LINE4, torch.bool)
    return local_after(reshard(random_whole(rank, torch.int64) > 0), (target,), LINE4)


def test_no_autograd_state_without_need(pool: Pools) -> None:
    assert pool(2).run(grad_states) == [[False, False, True]] * 2


def grad_states(rank: int, world: int) -> list[bool]:
    reshard = build((0,), ("R",), LINE2, torch.float32)
    x = torch.ones(2, 4, 8)
    outputs = [reshard(x), torch.no_grad()(reshard)(x.clone().requires_grad_()), reshard(x.clone().requires_grad_())]
    return [y.requires_grad for y in outputs]


def test_strided_inputs_and_gradients(pool: Pools) -> None:
    for source, target in itertools.permutations((0, 1, 2, "R", "P"), 2):
        assert pool(2).run(strided, source, target) == [True, True], (source, target)


def strided(rank: int, world: int, source: State, target: State) -> bool:
    """Whether transposed copies of the input and of the gradient give what contiguous ones do."""
    reshard = build((source,), (target,), LINE2, torch.float32)
    x = of_rank(lay_out(random_whole(0, torch.float32), (source,), LINE2, 1), LINE2, rank)
    twisted = x.transpose(0, 2).contiguous().transpose(0, 2)
    x, twisted = x.requires_grad_(), twisted.requires_grad_()
    y, z = reshard(x), reshard(twisted)
    y.backward(torch.arange(y.numel(), dtype=y.dtype).view(y.shape))
    z.backward(torch.arange(y.numel(), dtype=y.dtype).view(y.shape).t().contiguous().t())
    assert x.grad is not None and twisted.grad is not None
    return torch.equal(y, z) and torch.equal(x.grad, twisted.grad)


def test_reshard_describes_itself(pool: Pools) -> None:
    shapes, nbytes, text = pool(4).run(describe)[3]
    assert shapes == ((2, 4, 8), (4, 4, 8), (4, 2, 8))
    assert nbytes == (4 * 128, 4 * 128)
    assert "0->R over (0,) by all_gather, slice; R->1 over (1,) by slice, all_gather" in text


def describe(rank: int, world: int) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...], str]:
    steps = Step((0,), 0, "R"), Step((1,), "R", 1)
    reshard = Reshard(steps, (2, 4, 8), (4, 16), torch.float32, connected(SQUARE))
    return reshard.shapes, reshard.nbytes, repr(reshard)


COMPILERS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "dynamo": lambda function: torch.compile(function, backend="aot_eager", fullgraph=True),
    "aot": lambda function: aot_function(function, nop),
}


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("source, target", [(0, "G"), (1, 2), ("P", 1), ("G", 0), ("R", "G"), ("G", "P")], ids=str)
def test_compiled_agrees_with_eager(pool: Pools, source: State, target: State, compiler: str) -> None:
    assert pool(2).run(compiled_agrees, source, target, compiler) == [True, True]


def compiled_agrees(rank: int, world: int, source: State, target: State, compiler: str) -> bool:
    """Whether a graph that is a reshard after a sum of gradients and nothing else gives the same compiled.

    Its output may then alias its input, which is where compilers lose the backward of autograd functions.
    """
    reshard, reduce = build((source,), (target,), LINE2, torch.float32), ReduceGradients((0,), connected(LINE2))
    x = of_rank(lay_out(random_whole(0, torch.float32), (source,), LINE2, 1), LINE2, rank)
    outcomes = []

    def both(leaf: Tensor) -> Tensor:
        y: Tensor = reshard(reduce((leaf,))[0])
        return y

    for call in (both, COMPILERS[compiler](both)):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.backward(torch.full_like(y, rank + 1.0))
        assert leaf.grad is not None
        outcomes.append((y.detach(), leaf.grad))
    return all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


class CountCollectives(TorchDispatchMode):
    """Names the collectives that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "_c10d_functional" and func is not torch.ops._c10d_functional.wait_tensor.default:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("axes, ranks", [((0,), (1, 3)), ((1,), (2, 3)), ((0, 1), (0, 1, 2, 3))], ids=str)
def test_reduce_gradients(pool: Pools, axes: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    names, outputs, grads = pool(4).run(reduce_gradients, axes)[3]
    total = sum(rank + 1 for rank in ranks)
    assert names == ["all_reduce.default"] * 2
    assert outputs == [True] * 5
    weight, bias, half, unused, frozen = grads
    assert torch.equal(weight, torch.full((3, 2), 1.0 * total))
    assert torch.equal(bias, torch.full((), 2.0 * total))
    assert torch.equal(half, torch.full((5,), 3.0 * total, dtype=torch.bfloat16))
    assert torch.equal(unused, torch.zeros(4))
    assert frozen is None


def reduce_gradients(rank: int, world: int,
                     axes: tuple[int, ...]) -> tuple[list[str], list[bool], list[Tensor | None]]:
    """(collectives, whether each output is its input, gradients): a weight used once, a scalar twice, …"""
    inputs = (torch.randn(2, 3).t(), torch.randn(()), torch.randn(5).bfloat16(), torch.randn(4), torch.randn(2))
    for x in inputs[:4]:
        x.requires_grad_()
    outputs = ReduceGradients(axes, connected(SQUARE))(inputs)
    weight, bias, half, _, frozen = outputs
    with CountCollectives() as count:
        ((rank + 1) * (weight.sum() + 2 * bias + 3 * half.float().sum() + frozen.sum())).backward()
    return count.names, [torch.equal(x, y) for x, y in zip(inputs, outputs, strict=True)], [x.grad for x in inputs]


def test_reduce_gradients_without_need(pool: Pools) -> None:
    assert pool(4).run(untouched) == [[True, True, True]] * 4


def untouched(rank: int, world: int) -> list[bool]:
    """Whether tensors pass as they are: along an axis of extent 1, without gradient, and under no_grad."""
    plain, live = (torch.ones(2),), (torch.ones(2, requires_grad=True),)
    alone = ReduceGradients((1,), connected(Mesh((4, 1))))
    summing = ReduceGradients((0,), connected(Mesh((4, 1))))
    return [alone(live) is live, summing(plain) is plain, torch.no_grad()(summing)(live) is live]


def test_mesh_on_some_of_the_ranks(pool: Pools) -> None:
    first, second = Mesh((2,), (3, 0)), Mesh((2,), (1, 2))
    assert pool(4).run(stage_sum, first, second) == [3.0, 3.0, 3.0, 3.0]


def stage_sum(rank: int, world: int, *stages: Mesh) -> float:
    """The sum of the ranks of this rank's stage; the other stage's mesh has no group for it."""
    communicators = [connect(mesh, [(0,)]) for mesh in stages]
    mine, other = (c for _, c in sorted(zip([rank not in m.devices for m in stages], communicators, strict=True),
                                        key=lambda pair: pair[0]))
    assert not other.groups
    reshard = Reshard((Step((0,), "P", "R"),), (1,), (), torch.float32, mine)
    return float(reshard(torch.tensor([float(rank)])))


def test_groups_are_shared_and_world_is_reused(pool: Pools) -> None:
    for world, first, second, both in pool(4).run(group_names):
        assert (first, second, both) == (world, "", world)


def group_names(rank: int, world_size: int) -> list[str]:
    groups = connect(Mesh((4, 1), (1, 3, 0, 2))).groups
    world_group = torch.distributed.group.WORLD
    assert world_group is not None
    return [world_group.group_name, *(groups[axes].name for axes in ((0,), (1,), (0, 1)))]


def test_refusals(pool: Pools) -> None:
    with pytest.raises(AutoparError, match=r"call autopar\.init\(\) first"):
        connect(LINE2)
    assert all("start as many processes as the plan has devices" in text for text in pool(2).run(too_small))


def too_small(rank: int, world: int) -> str:
    with pytest.raises(AutoparError) as refused:
        connect(LINE4)
    return str(refused.value)
