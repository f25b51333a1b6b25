"""Parameters gathered and gradients summed on real ranks, in parts that need not be even."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from autopar.codegen.communicator import Communicator, connect
from autopar.codegen.groups import ParameterGroup
from autopar.codegen.travel import Member, Packing, Unit, send_whole
from autopar.core.mesh import Mesh
from tests.pool import Pool

pytestmark = pytest.mark.dist
SHAPES = {"even": ((8, 3), 0), "inner": ((3, 8, 2), 1), "uneven": ((5, 3), 0), "short": ((2, 7), 1), "flat": ((6,), 0)}
"""Whole shapes and the dim that is gathered; of two columns' seven some ranks have fewer, of five rows one has none."""


def whole(name: str, seed: int) -> Tensor:
    return torch.randn(SHAPES[name][0], generator=torch.Generator().manual_seed(seed))


@lru_cache
def connected(mesh: Mesh) -> Communicator:
    return connect(mesh)


def unit(mesh: Mesh, axes: tuple[int, ...], dtype: torch.dtype) -> Unit:
    group = connected(mesh).group(axes)
    members = tuple(Member(name, shape, dim, group.size) for name, (shape, dim) in SHAPES.items())
    parts = {}
    for member in members:
        rows = member.part[member.dim]
        start = min(group.index * rows, member.whole[member.dim])
        mine = whole(member.name, 0).narrow(member.dim, start, min(rows, member.whole[member.dim] - start))
        parts[member.name] = nn.Parameter(mine.contiguous())
    return Unit(ParameterGroup(parts), members, group, dtype, torch.float32, False)


def gathered(rank: int, _: int, mesh: Mesh, axes: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Gathered, let go and gathered again into the same tensors."""
    made = unit(mesh, axes, dtype)
    first = {name: (x, x.detach().clone()) for name, x in made.arrive().items()}
    made.leave()
    assert all(not x.untyped_storage().nbytes() for x, _ in first.values())
    again = made.arrive()
    assert all(again[name] is x and torch.equal(x, value) for name, (x, value) in first.items())
    return {name: x.detach() for name, x in again.items()}


def summed(rank: int, _: int, mesh: Mesh, axes: tuple[int, ...], over: tuple[int, ...]) -> dict[str, Tensor]:
    """This rank's parts of the sums of gradients that differ by rank; a frozen one has none."""
    made, into = unit(mesh, axes, torch.bfloat16), dict[str, list[Tensor]]()
    grads = {name: whole(name, rank + 1).bfloat16() for name in SHAPES if name != "flat"}
    for _step in made.send(grads, connected(mesh).group(over), into):
        pass
    return {name: part for name, (part,) in into.items()}


MESHES = [(Mesh((2,)), (0,)), (Mesh((2, 2)), (1,)), (Mesh((2, 2)), (0, 1)), (Mesh((4,), (2, 0, 3, 1)), (0,))]


@pytest.mark.parametrize(("mesh", "axes"), MESHES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_rank_gathers_the_whole(pool: Callable[[int], Pool], mesh: Mesh, axes: tuple[int, ...],
                                      dtype: torch.dtype) -> None:
    for found in pool(mesh.size).run(gathered, mesh, axes, dtype):
        for name in SHAPES:
            assert torch.equal(found[name], whole(name, 0).to(dtype)), name


@pytest.mark.parametrize(("mesh", "axes"), MESHES, ids=str)
@pytest.mark.parametrize("over", [(), (0,)])
def test_gradients_are_summed_in_fp32_part_by_part(pool: Callable[[int], Pool], mesh: Mesh, axes: tuple[int, ...],
                                                   over: tuple[int, ...]) -> None:
    if set(over) & set(axes):
        return
    results = pool(mesh.size).run(summed, mesh, axes, over)
    for rank, found in enumerate(results):
        together = next(ranks for ranks in mesh.groups(tuple(sorted({*axes, *over}))) if rank in ranks)
        index = next(ranks for ranks in mesh.groups(axes) if rank in ranks).index(rank)
        assert found.keys() == SHAPES.keys() - {"flat"}
        for name, (shape, dim) in SHAPES.items():
            if name in found:
                total = sum(whole(name, other + 1).bfloat16().float() for other in together)
                rows = -(-shape[dim] // len(next(iter(mesh.groups(axes)))))
                start = min(index * rows, shape[dim])
                mine = total.narrow(dim, start, min(rows, shape[dim] - start))  # type: ignore[union-attr]
                torch.testing.assert_close(found[name], mine)


def summed_whole(rank: int, _: int) -> dict[str, Tensor]:
    into: dict[str, list[Tensor]] = {}
    grads = {"a": whole("even", rank), "b": whole("flat", rank).bfloat16(), "c": whole("short", rank)}
    for _step in send_whole(grads, connected(Mesh((2,))).group((0,)), into):
        pass
    return {name: part for name, (part,) in into.items()}


def test_gradients_of_whole_parameters_keep_their_dtype(pool: Callable[[int], Pool]) -> None:
    for found in pool(2).run(summed_whole):
        torch.testing.assert_close(found["a"], whole("even", 0) + whole("even", 1))
        assert found["b"].dtype == torch.bfloat16 and found["c"].shape == (2, 7)


def test_places_in_a_buffer_are_apart_and_aligned() -> None:
    packing = Packing(tuple(Member(name, shape, dim, 3) for name, (shape, dim) in SHAPES.items()))
    buffer = torch.zeros(3, packing.length)
    for i, (member, place) in enumerate(packing.places(buffer)):
        assert place.shape == (3, *member.part) and place.storage_offset() % 16 == 0
        assert not place.any()
        place.fill_(i + 1.0)
