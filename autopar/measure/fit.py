"""Medians by bytes as a curve of as few knots as keep close to them.

A curve of knots at b_1 < … < b_k is Σ_j s_j · h_j(bytes), where h_j is the hat that is 1 at b_j and 0 at the other
knots, so for given knots the s_j of least Σ ((curve - measured) / measured)² are a linear least-squares solution. Knots
are sought among the sizes that were measured, the first and the last always being two.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from autopar.core.curves import Curve

CLOSE = 0.05
"""The misfit that is small enough to take no further knot."""
MOST_KNOTS = 5


def fitted(points: Sequence[tuple[float, float]]) -> Curve:
    """The curve of (bytes, seconds), bytes ascending: of fewest knots that keep within CLOSE, else the closest."""
    best: Curve | None = None
    for count in range(2, min(MOST_KNOTS, len(points)) + 1):
        inner = itertools.combinations(range(1, len(points) - 1), count - 2)
        found = min((_curve(points, (0, *knots, len(points) - 1)) for knots in inner), key=lambda curve: curve.misfit)
        best = found if best is None or found.misfit < best.misfit else best
        if best.misfit <= CLOSE:
            break
    assert best is not None, f"a curve needs two points, got {points}"
    return best


def _curve(points: Sequence[tuple[float, float]], knots: tuple[int, ...]) -> Curve:
    nbytes, seconds = np.array(points).T
    at = nbytes[list(knots)]
    hats = np.stack([np.interp(nbytes, at, row) for row in np.eye(len(at))], axis=1)
    values = np.linalg.lstsq(hats / seconds[:, None], np.ones(len(points)))[0]
    values = np.maximum.accumulate(np.maximum(values, seconds.min()))
    misfit = float(np.abs(hats @ values / seconds - 1.0).max())
    return Curve(tuple(at.tolist()), tuple(values.tolist()), misfit)
