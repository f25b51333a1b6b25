"""Curves: what they say at, between and beyond their knots, and what is no curve."""

from __future__ import annotations

import math

import pytest

from autopar.core.curves import Curve, curve_from_json
from autopar.core.errors import AutoparError

CURVE = Curve((1e3, 1e6, 3e6), (1e-5, 2e-5, 6e-5), 0.03)


@pytest.mark.parametrize(("nbytes", "seconds"), [
    (0, 1e-5), (1e3, 1e-5), (1e6, 2e-5), (2e6, 4e-5), (3e6, 6e-5), (5e6, 10e-5), (500_500, 1.5e-5),
])
def test_seconds(nbytes: float, seconds: float) -> None:
    assert CURVE.seconds(nbytes) == pytest.approx(seconds)


def test_latency_and_seconds_a_byte() -> None:
    assert (CURVE.fixed_s, CURVE.s_per_byte) == pytest.approx((1e-5, 2e-11))


def test_files_hold_the_same() -> None:
    assert curve_from_json(CURVE.to_json() | {"knot_bytes": list(CURVE.knot_bytes), "knot_s": list(CURVE.knot_s)}) == \
        CURVE


@pytest.mark.parametrize(("knot_bytes", "knot_s", "misfit", "message"), [
    ((1e3,), (1e-5,), 0.0, "1 knot_bytes and 1 knot_s, needed are two"), ((), (), 0.0, "0 knot_bytes"),
    ((1e3, 1e6), (1e-5,), 0.0, "2 knot_bytes and 1 knot_s"), ((1e6, 1e3), (1e-5, 1e-4), 0.0, "ascending"),
    ((1e3, 1e6), (1e-4, 1e-5), 0.0, "never fall"), ((1e3, 1e6), (0.0, 1e-5), 0.0, r"knot_s\[0\] is 0"),
    ((1e3, math.inf), (1e-5, 1e-4), 0.0, r"knot_bytes\[1\] is inf"), ((1e3, 1e6), (1e-5, math.nan), 0.0, "is nan"),
    ((1e3, 1e6), (1e-5, 1e-4), -0.1, "misfit is -0.1"), ((1e3, 1e6), (1e-5, 1e-4), math.nan, "misfit is nan"),
])
def test_no_curves(knot_bytes: tuple[float, ...], knot_s: tuple[float, ...], misfit: float, message: str) -> None:
    with pytest.raises(AutoparError, match=message):
        Curve(knot_bytes, knot_s, misfit)
