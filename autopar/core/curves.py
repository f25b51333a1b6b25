"""Measured seconds by bytes, as straight lines between few knots."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from autopar.core.errors import AutoparError
from autopar.core.figures import check_figure
from autopar.core.files import entries, entry


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds are `knot_s[i]` at `knot_bytes[i]` bytes and straight between knots.

    After the last knot it goes straight on; before the first it is as there: that is the latency. `misfit` is the
    largest |curve / measured - 1| of the medians that the curve was fitted to.
    """

    knot_bytes: tuple[float, ...]
    knot_s: tuple[float, ...]
    misfit: float = 0.0

    def __post_init__(self) -> None:
        if len(self.knot_bytes) < 2 or len(self.knot_s) != len(self.knot_bytes):
            raise AutoparError(f"a curve has {len(self.knot_bytes)} knot_bytes and {len(self.knot_s)} knot_s, needed "
                               "are two or more, as many of one as of the other")
        for name, values in (("knot_bytes", self.knot_bytes), ("knot_s", self.knot_s)):
            for i, value in enumerate(values):
                check_figure(name, f"[{i}]", value)
        if any(a >= b for a, b in itertools.pairwise(self.knot_bytes)):
            raise AutoparError(f"knot_bytes are {list(self.knot_bytes)}, needed are ascending ones")
        if any(a > b for a, b in itertools.pairwise(self.knot_s)):
            raise AutoparError(f"knot_s are {list(self.knot_s)}, needed are ones that never fall")
        if not 0.0 <= self.misfit < float("inf"):
            raise AutoparError(f"misfit is {self.misfit}, needed is a finite number of at least 0")

    def seconds(self, nbytes: float) -> float:
        """Seconds of a collective whose larger local tensor has `nbytes`."""
        if nbytes <= self.knot_bytes[0]:
            return self.knot_s[0]
        end = min(bisect_right(self.knot_bytes, nbytes), len(self.knot_bytes) - 1)
        return self.knot_s[end] + self._slope(end) * (nbytes - self.knot_bytes[end])

    @property
    def fixed_s(self) -> float:
        """α: seconds of the smallest message."""
        return self.knot_s[0]

    @property
    def s_per_byte(self) -> float:
        """β of the largest messages: the slope of the last line."""
        return self._slope(len(self.knot_s) - 1)

    def to_json(self) -> dict[str, Any]:
        """The knots with units in their names, and the misfit as a fraction."""
        return {"knot_bytes": self.knot_bytes, "knot_s": self.knot_s, "misfit": self.misfit}

    def _slope(self, end: int) -> float:
        return (self.knot_s[end] - self.knot_s[end - 1]) / (self.knot_bytes[end] - self.knot_bytes[end - 1])


def curve_from_json(data: dict[str, Any]) -> Curve:
    """The inverse of `Curve.to_json`. Raises AutoparError naming what is missing or wrong."""
    return Curve(entries(data, "knot_bytes", float), entries(data, "knot_s", float), entry(data, "misfit", float))
