"""Tiers of links: which devices hang together by links of at most some cost, and what that says of a layout.

At a level r devices that links of cost r or less join, one after another, are a part. A ring through a group costs r or
less only where the group lies in a part, so that what is left of each part must come to whole groups; and a cut of a
pipeline costs r or less only where as many columns stay in each part, so that a part that is new needs a cut that costs
more. Both are necessary, whatever else a layout does: the least level that passes is a bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Matrix = Sequence[Sequence[float]]
Part = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tier:
    """A level, the parts of classes that it joins, and the classes whose devices each stand alone."""

    cost: float
    parts: tuple[Part, ...]
    alone: tuple[int, ...]


def widest(cost: Matrix) -> list[list[float]]:
    """By pair the least that the dearest link costs on any way from one device to the other, in either direction.

    Those ways are the ones along a tree of least links, which grows link by link (Prim 1957).
    """
    both = np.asarray(cost, dtype=float)
    both = np.minimum(both, both.T)
    best = np.zeros_like(both)
    joined, least, via = [0], both[0].copy(), np.zeros(len(both), dtype=int)
    for _ in range(len(both) - 1):
        least[joined[-1]] = math.inf
        new = int(least.argmin())
        best[new, joined] = best[joined, new] = np.maximum(best[via[new], joined], least[new])
        nearer = (both[new] < least) & np.isfinite(least)
        via[nearer], least[nearer] = new, both[new][nearer]
        joined.append(new)
    found: list[list[float]] = best.tolist()
    return found


def tiers(cost: Matrix, classes: Sequence[Sequence[int]]) -> tuple[Tier, ...]:
    """The levels of links, the least first; the last joins all."""
    best, found = widest(cost), []
    levels = sorted({value for row in best for value in row}) if len(best) > 1 else [0.0]
    for level in levels:
        parts: list[list[int]] = []
        alone = [k for k, each in enumerate(classes) if len(each) > 1 and best[each[0]][each[1]] > level]
        for k, each in enumerate(classes):
            if k in alone:
                continue
            home = next((part for part in parts if best[classes[part[0]][0]][each[0]] <= level), None)
            parts.append([k]) if home is None else home.append(k)
        found.append(Tier(level, tuple(map(tuple, parts)), tuple(alone)))
    return tuple(found)


def packs(tier: Tier, size: int, left: Sequence[int], lacking: Sequence[int]) -> bool:
    """Whether what is `left` of each class may come to whole groups of `size` that each lie in a part; `lacking` are
    the devices that groups which are begun want, by the class of their first."""
    if any(left[k] or lacking[k] for k in tier.alone):
        return False
    for part in tier.parts:
        free = sum(left[k] - lacking[k] for k in part)
        if free < 0 or free % size:
            return False
    return True


def least_packed(levels: Sequence[Tier], size: int, left: Sequence[int], lacking: Sequence[int]) -> float:
    """The least cost of the dearest link in any group that is still to be made whole."""
    if size == 1 or not any(left):
        return 0.0
    return next(tier.cost for tier in levels if packs(tier, size, left, lacking))


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is still to come of a pipeline's cuts: `cuts` of them, `width` columns, `free` cells of the place begun."""

    cuts: int
    width: int
    free: int


def dear_cuts(tier: Tier, ahead: Ahead, left: Sequence[int], here: Sequence[int]) -> int:
    """How many of the cuts ahead cost more than the tier, at least; `here` are the columns of each class now."""
    new = sum(left[k] for k in tier.alone) + sum(
        1 for part in tier.parts if any(left[k] for k in part) and not any(here[k] for k in part))
    dear = max(0, math.ceil((new - ahead.free) / ahead.width))
    if dear or ahead.free or not ahead.cuts:
        return min(dear, ahead.cuts)
    return int(any(sum(left[k] for k in part) != ahead.cuts * sum(here[k] for k in part) for part in tier.parts)
               or any(left[k] or here[k] for k in tier.alone))


def least_cuts(levels: Sequence[Tier], ahead: Ahead, left: Sequence[int], here: Sequence[int]) -> tuple[float, float]:
    """The least that the cuts ahead cost, all together and the dearest of them."""
    if not ahead.cuts:
        return 0.0, 0.0
    total, most = 0.0, 0.0
    for tier, dearer in itertools.pairwise(levels):
        dear = dear_cuts(tier, ahead, left, here)
        if not dear:
            break
        total += dear * (dearer.cost - tier.cost)
        most = dearer.cost
    return total, most
