"""Curves fitted to points: as few knots as keep close, never falling."""

from __future__ import annotations

import random

import pytest

from autopar.measure.fit import CLOSE, MOST_KNOTS, fitted

SIZES = [float(2**n) for n in range(10, 30, 2)]


def test_one_line_is_one_line() -> None:
    curve = fitted([(size, 2e-5 + size / 1e10) for size in SIZES])
    assert len(curve.knot_s) == 2
    assert curve.misfit < 1e-6
    assert (curve.fixed_s, curve.s_per_byte) == pytest.approx((2e-5 + SIZES[0] / 1e10, 1e-10))


def test_noise_within_what_is_close_adds_no_knot() -> None:
    generator = random.Random(0)
    curve = fitted([(size, (2e-5 + size / 1e10) * generator.uniform(0.97, 1.03)) for size in SIZES])
    assert len(curve.knot_s) == 2 and curve.misfit <= CLOSE
    assert curve.s_per_byte == pytest.approx(1e-10, rel=0.05)


def test_a_bend_takes_a_knot() -> None:
    def seconds(size: float) -> float:
        return 2e-5 + size / 5e9 if size < 2**20 else 2e-5 + 2**20 / 5e9 + (size - 2**20) / 2e10
    curve = fitted([(size, seconds(size)) for size in SIZES])
    assert curve.knot_bytes == (SIZES[0], 2**20, SIZES[-1])
    assert curve.misfit < 1e-6
    assert [curve.seconds(size) for size in (5e5, 5e7)] == pytest.approx([seconds(5e5), seconds(5e7)])


@pytest.mark.parametrize("seed", range(5))
def test_whatever_was_measured_is_a_curve(seed: int) -> None:
    generator = random.Random(seed)
    points = [(size, generator.uniform(1e-5, 1e-3)) for size in SIZES]
    curve = fitted(points)
    assert len(curve.knot_s) <= MOST_KNOTS
    worst = max(abs(curve.seconds(size) / seconds - 1) for size, seconds in points)
    assert curve.misfit == pytest.approx(worst)


def test_noise_at_the_end_makes_no_message_free() -> None:
    points = [(size, 2e-5 + size / 1e10) for size in SIZES]
    size, seconds = points[-2]
    points[-2] = (size, 4.5 * seconds)
    curve = fitted(points)
    assert curve.s_per_byte >= 0.25 * (curve.knot_s[-1] - curve.knot_s[0]) / SIZES[-1]


def test_two_points_are_a_line() -> None:
    assert fitted([(1e3, 1e-5), (1e6, 1e-4)]).knot_s == pytest.approx((1e-5, 1e-4))
