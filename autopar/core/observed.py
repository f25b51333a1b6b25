"""What a device was seen to take for a class of equal segments, beside what its ops alone would come to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autopar.core.errors import AutoparError
from autopar.core.files import entry

_MOST = 1e6


@dataclass(frozen=True, slots=True)
class Observed:
    """One measured way to run the class of the segment called `segment`: its seconds over those of the roofline.

    `variant` names the lowered program that ran. What collectives take is in neither.
    """

    segment: str
    variant: str
    forward: float
    backward: float

    def __post_init__(self) -> None:
        for name in ("forward", "backward"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0.0 < value < _MOST):
                raise AutoparError(f"'{name}' of the measured segment {self.segment} is {value}, needed is a number "
                                   f"above 0 and below {_MOST:g}: measure it again")


Factors = Mapping[str, tuple[float, float]]
"""Measured seconds over the roofline's, forward and backward, by the first segment of a class."""


def factors_of(observed: tuple[Observed, ...]) -> dict[str, tuple[float, float]]:
    """By segment."""
    return {each.segment: (each.forward, each.backward) for each in observed}


def observed_from_json(data: dict[str, Any]) -> Observed:
    """The inverse of `dataclasses.asdict`. Raises AutoparError naming what is missing or wrong."""
    return Observed(entry(data, "segment", str), entry(data, "variant", str), entry(data, "forward", float),
                    entry(data, "backward", float))
