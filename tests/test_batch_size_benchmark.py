"""benchmarks/batch_size.py: what is told of batches by expressions."""

from __future__ import annotations

import math
import sys
from itertools import chain
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from batch_size import Model, Point, affine, best_of, curve, lines_through

MODEL = Model(affine((1, 3.0), (2, 5.0)), affine((1, 30.0), (3, 50.0)), lines_through([(5.0, 1.0), (8.0, 4.0)]), 8.0)
"""1 + 2 b seconds and 20 + 10 b bytes; of a sample's 10 bytes 5 go for a second, and 3 more for a second each."""


def test_lines_are_the_hull_from_below() -> None:
    found = chain.from_iterable(lines_through([(5.0, 1.0), (8.0, 4.0), (6.0, 3.9)]))
    assert list(found) == pytest.approx([0.0, 0.2, -4.0, 1.0])


@pytest.mark.parametrize(("batch", "seconds"), [(1, 3.0), (3, 7.0), (6, 13.0 + 6), (10, 21.0 + 30), (16, math.inf)])
def test_seconds_within_a_budget(batch: int, seconds: float) -> None:
    rate = {point.batch: point.told for point in curve(MODEL, 50.0, 16, 2)}
    assert rate.get(batch, 0.0) == pytest.approx(2 * batch / seconds)


def test_the_best_is_one_that_was_planned() -> None:
    points = [Point(1, 9.0), Point(2, 5.0, 4.0, 1.0), Point(3, 5.0, 4.5, 1.0)]
    assert best_of(points).batch == 3
