"""Medians by bytes as a curve of as few knots as keep close to them.

A curve of knots at b_1 < … < b_k is Σ_j s_j · h_j(bytes), where h_j is the hat that is 1 at b_j and 0 at the other
knots, so for given knots the s_j of least Σ ((curve - measured) / measured)² are a linear least-squares solution. Knots
are sought among the sizes that were measured, the first and the last always being two. Curves that end in a line far
flatter than they are as a whole are no candidates: noise makes them, and would make any larger message free.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from autopar.core.curves import Curve

CLOSE = 0.05
"""The misfit that is small enough to take no further knot."""
MOST_KNOTS = 5
FLATTEST = 0.25
"""The slope of the last line over that from the first knot to the last, at least."""


def fitted(points: Sequence[tuple[float, float]]) -> Curve:
    """The curve of (bytes, seconds), bytes ascending: of fewest knots that keep within CLOSE, else the closest."""
    best: Curve | None = None
    for count in range(2, min(MOST_KNOTS, len(points)) + 1):
        inner = itertools.combinations(range(1, len(points) - 1), count - 2)
        curves = (_curve(points, (0, *knots, len(points) - 1)) for knots in inner)
        found = min((curve for curve in curves if count == 2 or _rises(curve)), key=lambda curve: curve.misfit,
                    default=best)
        best = found if best is None or (found is not None and found.misfit < best.misfit) else best
        if best is not None and best.misfit <= CLOSE:
            break
    assert best is not None, f"a curve needs two points, got {points}"
    return best


def _rises(curve: Curve) -> bool:
    mean = (curve.knot_s[-1] - curve.knot_s[0]) / (curve.knot_bytes[-1] - curve.knot_bytes[0])
    return curve.s_per_byte >= FLATTEST * mean


def _curve(points: Sequence[tuple[float, float]], knots: tuple[int, ...]) -> Curve:
    nbytes, seconds = np.array(points).T
    at = nbytes[list(knots)]
    hats = np.stack([np.interp(nbytes, at, row) for row in np.eye(len(at))], axis=1)
    values = np.linalg.lstsq(hats / seconds[:, None], np.ones(len(points)))[0]
    values = np.maximum.accumulate(np.maximum(values, seconds.min()))
    misfit = float(np.abs(hats @ values / seconds - 1.0).max())
    return Curve(tuple(at.tolist()), tuple(values.tolist()), misfit)
