"""Elimination against trying everything."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from autopar.solver import elimination
from autopar.solver.elimination import Array, Scope, eliminate, schedule


def random_tables(seed: int) -> tuple[tuple[int, ...], list[Scope], list[Array]]:
    """A few variables, tables over one to three of them in any order, some entries infinite."""
    of = random.Random(seed)
    sizes = tuple(of.randint(1, 4) for _ in range(of.randint(1, 6)))
    scopes = [tuple(of.sample(range(len(sizes)), min(len(sizes), of.randint(1, 3)))) for _ in range(of.randint(1, 8))]
    numbers = np.random.default_rng(seed)
    tables = [numbers.random(tuple(sizes[v] for v in scope)) for scope in scopes]
    return sizes, scopes, [np.where(numbers.random(t.shape) < 0.1, math.inf, t) for t in tables]


def total(scopes: list[Scope], tables: list[Array], levels: tuple[int, ...]) -> float:
    return sum(float(t[tuple(levels[v] for v in scope)]) for scope, t in zip(scopes, tables, strict=True))


@pytest.mark.parametrize("limit", [elimination.LIMIT, 12])
def test_values_and_marginals_are_those_of_trying_everything(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "LIMIT", limit)
    copied = 0
    for seed in range(300):
        sizes, scopes, tables = random_tables(seed)
        sums = {levels: total(scopes, tables, levels) for levels in itertools.product(*map(range, sizes))}
        plan = schedule(sizes, scopes)
        found = eliminate(plan, tables)
        marginals = found.marginals()
        copied += not plan.exact
        assert found.value <= min(sums.values()) * (1 + 1e-12)
        for v, size in enumerate(sizes):
            for level in range(size):
                least = min(value for levels, value in sums.items() if levels[v] == level)
                assert marginals[v][level] <= least * (1 + 1e-12)
                if plan.exact:
                    assert marginals[v][level] == pytest.approx(least, rel=1e-12)
        if plan.exact:
            assert sums[found.choices()] == pytest.approx(found.value, rel=1e-12)
    assert bool(copied) == (limit == 12)
