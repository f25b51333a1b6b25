"""The least sum of tables over many variables, by eliminating one variable after another.

    minimise Σ_f table_f[x of its scope]      x_v ∈ {0, …, size_v − 1}

Eliminating v adds the tables that mention it and takes the least over v, which leaves a table over their other
variables (bucket elimination: Dechter 1999). Where that would exceed `LIMIT` entries the tables are added in groups,
each with its own copy of v (mini-buckets: Dechter and Rish 2003): the value is then a lower bound. A second pass, from
the last table back to the first, finds for every variable and level the least sum with it, or a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LIMIT = 8_000_000
"""The most entries of a table that elimination may make."""
MOST_DIMS = 48
"""And its most dims: numpy's arrays have at most 64."""
Array = NDArray[np.float64]
Scope = tuple[int, ...]
Source = tuple[bool, int]
"""Where a bucket's table is from: an earlier bucket (True) or a given table, with its number."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tables added to eliminate the first variable of `scope`; `sources` are these, each with its scope."""

    scope: Scope
    sources: tuple[tuple[Source, Scope], ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How to eliminate all variables; `heirs[b]` is the bucket that takes the result of bucket b, None for a number."""

    sizes: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    heirs: tuple[int | None, ...]

    @property
    def exact(self) -> bool:
        """Whether no variable was copied, so that values are no mere bounds."""
        return len(self.buckets) == len(self.sizes)


def schedule(sizes: Sequence[int], scopes: Sequence[Scope]) -> Schedule:
    """An order that keeps tables small: next is always the variable whose elimination makes the smallest."""
    alive: dict[Source, Scope] = {(False, f): scope for f, scope in enumerate(scopes)}
    buckets: list[Bucket] = []
    heirs: dict[int, int] = {}
    left = set(range(len(sizes)))
    while left:
        v = min(left, key=lambda u: (_entries({w for scope in alive.values() if u in scope for w in scope}, sizes), u))
        left.remove(v)
        for group in _groups(v, {source: scope for source, scope in alive.items() if v in scope}, sizes):
            rest = sorted({w for scope in group.values() for w in scope} - {v})
            heirs |= {number: len(buckets) for earlier, number in group if earlier}
            for source in group:
                del alive[source]
            alive[True, len(buckets)] = tuple(rest)
            buckets.append(Bucket((v, *rest), tuple(group.items())))
    return Schedule(tuple(sizes), tuple(buckets), tuple(heirs.get(b) for b in range(len(buckets))))


def _groups(v: int, tables: dict[Source, Scope], sizes: Sequence[int]) -> list[dict[Source, Scope]]:
    """The tables that mention v, in as few groups as keep within the limit; one empty group where none does."""
    groups: list[dict[Source, Scope]] = []
    for source, scope in sorted(tables.items(), key=lambda item: -_entries(item[1], sizes)):
        for group in groups:
            joined = {*scope, *(w for other in group.values() for w in other)}
            if len(joined) <= MOST_DIMS and _entries(joined, sizes) <= LIMIT:
                group[source] = scope
                break
        else:
            groups.append({source: scope})
    return groups or [{}]


def _entries(scope: Iterable[int], sizes: Sequence[int]) -> int:
    return math.prod(sizes[v] for v in scope)


@dataclass(frozen=True, slots=True)
class Elimination:
    """A schedule carried out for given tables; `made[b]` is the table that bucket b leaves."""

    schedule: Schedule
    tables: tuple[Array, ...]
    made: tuple[Array, ...]

    @property
    def value(self) -> float:
        """The least sum, or a lower bound of it."""
        numbers = (made for made, heir in zip(self.made, self.schedule.heirs, strict=True) if heir is None)
        return float(sum(float(number) for number in numbers))

    def choices(self) -> tuple[int, ...]:
        """A level for each variable that gives the least sum; where variables were copied a good guess."""
        taken: dict[int, int] = {}
        copies: dict[int, list[int]] = {}
        for b, bucket in enumerate(self.schedule.buckets):
            copies.setdefault(bucket.scope[0], []).append(b)
        for v, buckets in reversed(copies.items()):
            sums = sum(np.broadcast_to(self._added(b, taken).reshape(-1), (self.schedule.sizes[v],)) for b in buckets)
            taken[v] = int(np.argmin(sums))
        return tuple(taken[v] for v in range(len(self.schedule.sizes)))

    def marginals(self) -> tuple[Array, ...]:
        """For each variable and level the least sum with it, or a lower bound."""
        sizes, total = self.schedule.sizes, self.value
        if math.isinf(total):
            return tuple(np.full(size, math.inf) for size in sizes)
        found = [np.full(size, -math.inf) for size in sizes]
        beliefs: dict[int, Array] = {}
        waiting = {b: self.schedule.heirs.count(b) for b in range(len(self.schedule.buckets))}
        for b in reversed(range(len(self.schedule.buckets))):
            scope, heir = self.schedule.buckets[b].scope, self.schedule.heirs[b]
            if heir is None:
                outside: Array = np.asarray(total - float(self.made[b]))
            else:
                outside = _less(_least(beliefs[heir], self.schedule.buckets[heir].scope, scope[1:]), self.made[b])
                waiting[heir] -= 1
                if not waiting[heir]:
                    del beliefs[heir]
            belief = np.broadcast_to(self._added(b, {}) + outside, tuple(sizes[v] for v in scope))
            np.maximum(found[scope[0]], belief.reshape(sizes[scope[0]], -1).min(1), out=found[scope[0]])
            if waiting[b]:
                beliefs[b] = belief
        return tuple(found)

    def _added(self, b: int, fixed: dict[int, int]) -> Array:
        return _sum(self.schedule.buckets[b], self.tables, self.made, fixed)


def eliminate(plan: Schedule, tables: Sequence[Array]) -> Elimination:
    """Carry out a schedule; `tables[f]` has the sizes of the variables in its scope, and no NaN."""
    made: list[Array] = []
    for bucket in plan.buckets:
        added = _sum(bucket, tables, made, {})
        shape = tuple(plan.sizes[v] for v in bucket.scope)
        made.append(np.asarray(np.broadcast_to(added, shape).min(0)))
    return Elimination(plan, tuple(tables), tuple(made))


def _sum(bucket: Bucket, tables: Sequence[Array], made: Sequence[Array], fixed: dict[int, int]) -> Array:
    """The tables of a bucket, added over its scope; variables in `fixed` at their level, with size 1."""
    total: Array = np.zeros((1,) * len(bucket.scope))
    for (earlier, number), scope in sorted(bucket.sources, key=lambda item: len(item[1])):
        table = made[number] if earlier else tables[number]
        for place, v in enumerate(scope):
            if v in fixed:
                table = table.take([fixed[v]], axis=place)
        total = total + _aligned(table, scope, bucket.scope)
    return total


def _aligned(table: Array, scope: Scope, wanted: Scope) -> Array:
    """`table` with its dims in the order of `wanted`, of size 1 where it has none."""
    order = [scope.index(v) for v in wanted if v in scope]
    shape = iter([table.shape[place] for place in order])
    return table.transpose(order).reshape([next(shape) if v in scope else 1 for v in wanted])


def _least(table: Array, scope: Scope, wanted: Scope) -> Array:
    """The least over the variables that are not in `wanted`."""
    least = np.asarray(table.min(tuple(place for place, v in enumerate(scope) if v not in wanted)))
    return _aligned(least, tuple(v for v in scope if v in wanted), wanted)


def _less(table: Array, part: Array) -> Array:
    """`table` − `part`; infinite where the table is."""
    return np.where(np.isfinite(table), table - np.where(np.isfinite(part), part, 0.0), math.inf)
