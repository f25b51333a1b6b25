"""Random masks: drawn by global element, evenly, afresh for every step and op."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from autopar.codegen.communicator import Group
from autopar.codegen.draws import SEED_BITS, GlobalIndex, Part, Samples, draw, keep_mask

CPU = torch.device("cpu")
COUNT = 1 << 16


def mask(seed: int, salt: int, rate: float = 0.3, start: int = 0, count: int = COUNT) -> torch.Tensor:
    return keep_mask(torch.arange(start, start + count), torch.tensor(seed), salt, rate)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [0, 1 << 31, 1 << 40])
def test_a_mask_keeps_the_share_it_should(rate: float, start: int) -> None:
    kept = mask(3, 1, rate, start).double()
    deviation = (rate * (1 - rate) / COUNT) ** 0.5
    assert abs(float(kept.mean()) - (1 - rate)) <= 5 * deviation
    for distance in (1, 2, 64, 1024):
        together = float((kept[distance:] * kept[:-distance]).mean())
        assert abs(together - (1 - rate) ** 2) <= 8 * deviation


@pytest.mark.parametrize(("first", "second"), [((0, 0), (1, 0)), ((0, 0), (0, 1)), ((5, 1), (5, 2)), ((1, 0), (0, 1))])
def test_masks_of_other_steps_and_ops_are_independent(first: tuple[int, int], second: tuple[int, int]) -> None:
    same = float((mask(*first, 0.5) == mask(*second, 0.5)).double().mean())
    assert abs(same - 0.5) <= 5 * 0.5 / COUNT ** 0.5


def test_draws_fill_their_range() -> None:
    drawn = draw(torch.arange(COUNT), torch.tensor(11), 2)
    assert 0 <= int(drawn.min()) < 2**20 and 2**32 - 2**20 < int(drawn.max()) < 2**32
    buckets = torch.bincount(drawn >> 28, minlength=16).double()
    assert float(((buckets - COUNT / 16) ** 2 / (COUNT / 16)).sum()) < 50


@pytest.mark.parametrize(("whole", "parts"), [
    ((8,), (2,)), ((4, 6), (2, 3)), ((4, 3, 8), (4, 1, 2)), ((5,), (1,)), ((), ()),
])
def test_global_indices_of_all_shards_are_those_of_the_whole(whole: tuple[int, ...], parts: tuple[int, ...]) -> None:
    expected = torch.arange(math.prod(whole)).reshape(whole)
    for place in itertools.product(*map(range, parts)):
        cut = expected
        for dim, (n, i) in enumerate(zip(parts, place, strict=True)):
            cut = cut.chunk(n, dim)[i]
        groups = tuple(Group("", i, tuple(range(n))) for n, i in zip(parts, place, strict=True))
        assert torch.equal(GlobalIndex(whole, groups)(CPU, torch.tensor(0)), cut)


def of_micro(whole: tuple[int, ...], batch: int, parts: int, pieces: int, micro: int) -> torch.Tensor:
    """The indices in a tensor of its samples, on dim `batch`, that a micro-batch has: a run of each piece."""
    run = whole[batch] // parts // pieces
    runs = torch.arange(math.prod(whole)).reshape(whole).split(run, batch)
    return torch.cat([runs[piece * parts + micro] for piece in range(pieces)], batch)


@pytest.mark.parametrize(("whole", "batch", "parts", "pieces"), [
    ((8, 3), 0, 2, 1), ((8, 3), 0, 2, 2), ((8, 1, 3), 0, 4, 2), ((5, 8, 2), 1, 4, 1), ((8, 3), 0, 8, 1),
    ((5, 4, 2), 1, 4, 1), ((8,), 0, 4, 1), ((2, 4, 3), 1, 2, 2), ((1, 4, 4), 1, 2, 1)])
def test_indices_of_a_micro_batch_are_those_of_its_samples(whole: tuple[int, ...], batch: int, parts: int,
                                                           pieces: int) -> None:
    small = tuple(size // parts if i == batch else size for i, size in enumerate(whole))
    part = Part(Samples(parts, small[batch], pieces), math.prod(whole[batch + 1:]))
    for ranks in {1, 2 if small[batch] % 2 == 0 else 1}:
        for micro in range(parts):
            seed, expected = torch.tensor(7 + (micro << SEED_BITS)), of_micro(whole, batch, parts, pieces, micro)
            for rank, wanted in enumerate(expected.chunk(ranks, batch)):
                groups = tuple(Group("", rank, tuple(range(ranks))) if i == batch else Group("", 0, (0,))
                               for i in range(len(small)))
                assert torch.equal(GlobalIndex(small, groups, part)(CPU, seed), wanted)


def test_the_number_of_a_micro_batch_is_no_part_of_what_is_drawn_from() -> None:
    assert torch.equal(mask(3, 1), keep_mask(torch.arange(COUNT), torch.tensor(3 + (5 << SEED_BITS)), 1, 0.3))
