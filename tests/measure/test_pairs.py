"""A latency and a rate from exchanges."""

from __future__ import annotations

import pytest

from autopar.measure.pairs import line


def test_exchanges_tell_latency_and_rate() -> None:
    points = [(size, 2 * 30e-6 + size / 5e9) for size in (1024, 2**20, 2**26, 2**28)]
    assert line(points) == pytest.approx((30e-6, 5e9), rel=0.01)


def test_noise_never_makes_a_link_of_no_rate() -> None:
    assert line([(1024, 3e-3), (2**20, 1e-3), (2**21, 2e-3)]) == (1.5e-3, 2**21 / 2e-3)
