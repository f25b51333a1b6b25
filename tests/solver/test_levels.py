"""Counts of equal segments at each level, against brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from autopar.core.errors import Infeasible
from autopar.core.levels import Counts, Entry, Step, Stretch, bytes_of, seconds_of
from autopar.solver.levels import least_seconds, solve


def random_step(seed: int) -> Step:
    """One to three stretches of up to four segments with up to three entries."""
    rng = random.Random(seed)

    def figures(least: int, most: int) -> tuple[float, ...]:
        return tuple(float(rng.choice((0, rng.randint(least, most)))) for _ in range(2))

    def entry() -> Entry:
        return Entry(float(rng.randrange(100)), figures(-20, 80), rng.random())

    stretches = tuple(
        Stretch(f"g{g}", rng.randint(1, 4), tuple(sorted((entry() for _ in range(rng.randint(1, 3))),
                                                         key=lambda e: e.saved)), figures(10, 90), figures(-30, 30))
        for g in range(rng.randint(1, 3)))
    step = Step(stretches, 10.0, 0.0)
    held = sorted(bytes_of(step, counts) for counts in every(step))
    return replace(step, budget=held[0] + rng.uniform(-0.1, 0.9) * (held[-1] - held[0]))


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as so many numbers."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        yield from ((first, *rest) for rest in compositions(total - first, parts - 1))


def every(step: Step) -> Iterator[Counts]:
    """All counts."""
    return itertools.product(*(list(compositions(s.count, len(s.menu))) for s in step.stretches))


@pytest.mark.parametrize(("solver", "seeds"), [("highs", range(300)), ("cbc", range(40))])
def test_optimum_is_that_of_brute_force(solver: str, seeds: range) -> None:
    refused = 0
    for step in map(random_step, seeds):
        fitting = [seconds_of(step, counts) for counts in every(step) if bytes_of(step, counts) <= step.budget]
        if not fitting:
            refused += 1
            with pytest.raises(Infeasible) as told:
                solve(step, solver)
            assert told.value.least_budget_bytes == pytest.approx(min(bytes_of(step, c) for c in every(step)))
            continue
        found = solve(step, solver)
        assert bytes_of(step, found) <= step.budget * (1 + 1e-9)
        assert seconds_of(step, found) == pytest.approx(min(fitting), abs=1e-9)
        assert least_seconds(step, solver) <= min(fitting) + 1e-9
    assert 0 < refused < len(seeds) / 2
