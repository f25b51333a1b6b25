"""Numbers of a cut vocabulary, lookups and losses in 16 bits, numbers that the vocabulary does not have."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autopar.codegen.communicator import Communicator, Group
from autopar.codegen.vocabulary import ClassesApart, Embedding, Places
from autopar.core.mesh import Mesh
from tests.simulator import simulate

ROWS, CLASSES = 64, 512
MESH = Mesh((4,))


def apart(sizes: tuple[int, ...], counts: tuple[int, ...], parts: tuple[int, ...]) -> Places:
    """The places of the rank with these `parts`, factor i cut into `counts[i]`."""
    groups = (Group("", part, tuple(range(count))) for part, count in zip(parts, counts, strict=True))
    return Places(sizes, tuple(groups))


@pytest.mark.parametrize(("sizes", "counts"), [((8,), (4,)), ((8,), (1,)), ((4, 6), (2, 3)), ((4, 6), (1, 3)),
                                               ((2, 3, 4), (2, 1, 2))])
def test_every_number_is_with_one_rank_at_the_place_it_is_cut_to(sizes: tuple[int, ...],
                                                                 counts: tuple[int, ...]) -> None:
    numbers, seen = torch.arange(math.prod(sizes)), torch.zeros(math.prod(sizes), dtype=torch.int64)
    for parts in itertools.product(*map(range, counts)):
        local = numbers.reshape(sizes)
        for dim, (count, part) in enumerate(zip(counts, parts, strict=True)):
            local = local.chunk(count, dim)[part]
        places = apart(sizes, counts, parts)
        here, place = places.of(numbers)
        assert torch.equal(local.reshape(-1)[place[here]], numbers[here])
        assert int(here.sum()) == local.numel() and not place[~here].any()
        assert [places.of_one(int(n)) for n in numbers] == place.where(here, -1).tolist()
        seen += here
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize("number", [8, 11, -1, -9])
def test_a_row_that_the_table_does_not_have_is_refused_on_every_rank(number: int) -> None:
    for part in range(4):
        with pytest.raises(IndexError):
            Embedding(apart((8,), (4,), (part,)))(torch.zeros(2, 3), torch.tensor([0, number]))


def class_parts(dtype: torch.dtype, smoothing: float) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Rows' terms of each of four ranks, all gradients joined, the logits and targets they are of."""
    generator = torch.Generator().manual_seed(0)
    logits = (6 * torch.randn(ROWS, CLASSES, generator=generator)).to(dtype)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)

    def act(communicator: Communicator) -> tuple[Tensor, Tensor]:
        group = communicator.group((0,))
        mine = logits.chunk(group.size, 1)[group.index].clone().requires_grad_()
        rows = ClassesApart.apply(mine, target, Places((CLASSES,), (group,)), group, -100,  # type: ignore[no-untyped-call]
                                  smoothing)
        rows.sum().backward()
        assert mine.grad is not None
        return rows.detach(), mine.grad

    found = simulate(MESH, act)
    return [rows for rows, _ in found], torch.cat([grad for _, grad in found], 1), logits, target


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_logits_are_taken_in_32(dtype: torch.dtype, smoothing: float) -> None:
    terms, gradient, logits, target = class_parts(dtype, smoothing)
    exact = logits.double().requires_grad_()
    rows = F.cross_entropy(exact, target, reduction="none", label_smoothing=smoothing)
    rows.sum().backward()
    assert exact.grad is not None and gradient.dtype == dtype
    assert all(t.dtype == torch.float32 for t in terms)
    assert float((torch.stack(terms).sum(0) - rows.detach()).abs().max()) <= 1e-5 * float(rows.detach().abs().max())
    assert float((gradient.double() - exact.grad).abs().max()) <= torch.finfo(dtype).eps


def test_without_smoothing_one_rank_answers_for_a_row() -> None:
    terms, _, _, target = class_parts(torch.float32, 0.0)
    for rank, mine in enumerate(terms):
        assert torch.equal(mine != 0, target // (CLASSES // MESH.size) == rank)
