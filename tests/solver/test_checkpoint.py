"""What to keep at a price, against brute force, and the menus that prices make."""

from __future__ import annotations

import itertools
import random

import pytest

from autopar.core.checkpoint import Local, Read, Value, keep
from autopar.solver.checkpoint import Priced, menu, solve

EXACT = 1e-6


def random_local(seed: int) -> Local:
    """Up to seven values of five names, made by up to four ops from earlier ones."""
    rng = random.Random(seed)
    ops = rng.randint(1, 4)
    values = tuple(
        Value(f"m{rng.randrange(5)}", float(rng.randrange(100)), rng.randrange(ops),
              tuple(rng.sample(range(v), rng.randint(0, min(v, 2)))), rng.random() < 0.4,
              rng.choice((0.0, rng.random())), rng.random() < 0.7) for v in range(rng.randint(1, 7)))
    pairs = sorted({(value.op, u) for value in values for u in value.inputs})
    reads = tuple(Read(*pair, rng.random(), rng.random() < 0.3) for pair in pairs if rng.random() < 0.7)
    seconds = tuple(rng.choice((0.0, 10 * rng.random())) for _ in range(ops))
    return Local(values, seconds, reads, frozenset(rng.sample(["m0", "m1", "m2"], rng.randint(0, 1))))


def least(priced: Priced) -> float:
    """The least of all subsets of names."""
    names = priced.local.names
    subsets = (frozenset(some) for n in range(len(names) + 1) for some in itertools.combinations(names, n))
    return min(priced.seconds(keep(priced.local, subset)) for subset in subsets)


@pytest.mark.parametrize(("solver", "seeds"), [("highs", range(300)), ("cbc", range(40))])
def test_optimum_is_that_of_brute_force(solver: str, seeds: range) -> None:
    recomputed = 0
    for seed in seeds:
        rng = random.Random(seed)
        priced = Priced(random_local(seed), 10 ** rng.uniform(-4, 1), rng.random())
        found = solve(priced, solver)
        assert priced.seconds(found) == pytest.approx(least(priced), rel=EXACT, abs=1e-9)
        recomputed += bool(found.again and found.saved)
    assert recomputed > len(seeds) / 10


CHAIN = Local((Value("x", 8.0, 0, (), True), Value("matmul", 8.0, 1, (0,), True), Value("act", 8.0, 2, (1,), True)),
              (0.0, 10.0, 1.0), (), frozenset({"x"}))
"""An input that is there anyway, a matmul of it, and pointwise work on that."""


def test_the_cheap_is_made_again_first() -> None:
    assert [kept.names for kept in menu(CHAIN, 0.1, "highs")] == [("matmul", "act"), ("matmul",), ()]


def test_what_is_kept_and_not_needed_takes_no_memory() -> None:
    local = Local((Value("a", 8.0, 0), Value("b", 8.0, 1, (0,), True)), (1.0, 1.0))
    assert keep(local, frozenset({"a", "b"})).names == ("b",)
    assert keep(local, frozenset({"a"})).nbytes == 8.0


def test_work_in_one_kernel_reads_and_writes_nothing_between() -> None:
    values = (Value("x", 8.0, 0, (), True), Value("a", 8.0, 1, (0,), lands=False),
              Value("b", 8.0, 2, (1,), True, write=4.0))
    local = Local(values, (0.0, 0.0, 0.0), (Read(1, 0, 1.0, True), Read(2, 1, 2.0)), frozenset({"x"}))
    assert keep(local, frozenset()).seconds == 1.0 + 4.0
    assert keep(local, frozenset({"a"})).seconds == 2.0 + 4.0
    assert keep(local, frozenset()).transient == 8.0
