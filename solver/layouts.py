"""The search of `solver.mapping`: cell after cell, place by place, cut off by what is certain already.

Of a layout that is begun it knows what the cuts and rings that are whole cost; of those that are begun the least, by
the links that are there and by those that the rest may take (`solver.columns`, `solver.rings`); and of those to come,
by the tiers of links, the least (`solver.tiers`). Where places have one axis, a place is a set, and the columns behind
a cut are matched when it is whole.

Where as many devices of each class were used before and the last place was the same but for what its rows and columns
are called, a layout is left off that is nowhere cheaper than another, whatever follows: a sum counts in full, and of a
maximum no more than by what it is the greater one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from autopar.solver.columns import ROUNDING, Columns
from autopar.solver.grid import Cells, State, Task, lines, turns
from autopar.solver.rings import Rings


@dataclass(eq=False)
class Search:
    """A search that ends at `end`; `best` seconds, of `devices`, are known already. `open` are the bounds of what was
    not looked into."""

    task: Task
    price: Callable[[Cells], float]
    end: float
    clock: Callable[[], float] = time.perf_counter
    best: float = math.inf
    devices: Cells = ()
    open: list[float] = field(default_factory=list)
    seen: dict[object, list[State]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.columns, self.rings = Columns(self.task, self.task.send), Rings(self.task)
        self.around = Columns(self.task, self.task.around)
        self.home = self.columns.home
        self.turns, self.lines = turns(self.task.inner, self.task.around), lines(self.task.inner)

    def known(self, devices: Cells) -> None:
        """Take a layout if it is the best so far."""
        seconds = self.price(devices)
        if seconds < self.best:
            self.best, self.devices = seconds, devices

    def run(self) -> None:
        """Look for better layouts, until all others are known to be none."""
        root = State((), tuple(map(len, self.task.classes)), 0.0, 0.0, 0, self.columns.begun,
                     self.rings.begun())
        self._below(root, self.certain(root))

    def _below(self, state: State, bound: float) -> None:
        """Try all layouts that begin so, which take `bound` seconds at least."""
        if len(state.cells) == self.task.size:
            self.known(state.cells if self.turns else self.columns.aligned(state.cells))
            return
        if self.clock() > self.end:
            self.open.append(bound)
            return
        if state.cells and len(state.cells) % self.task.width == 0 and self._dominated(state):
            return
        options: list[tuple[float, int, State]] = []
        for k, n in enumerate(state.left):
            if n and self._in_order(state, k):
                child = self._placed(state, k)
                options.append((max(bound, self.certain(child)), k, child))
        for least, _, child in sorted(options, key=lambda option: option[:2]):
            if least < self.best * (1.0 - ROUNDING):
                self._into(child, least)

    def _into(self, child: State, bound: float) -> None:
        """Go on from a child; of a place that is a set the columns are matched only here."""
        width = self.task.width
        if not self.turns and len(child.cells) % width == 0 and len(child.cells) > width:
            before, after = child.cells[-2 * width:-width], child.cells[-width:]
            child = self._cut(child, self.columns.best(before, after))
            bound = max(bound, self.certain(child))
            if bound >= self.best * (1.0 - ROUNDING):
                return
        self._below(child, bound)

    def _cut(self, state: State, seconds: float) -> State:
        """`state` with a cut that is whole now."""
        return State(state.cells, state.left, state.sum + seconds, max(state.most, seconds), state.cuts + 1,
                     self.columns.begun, state.rungs)

    def _placed(self, state: State, k: int) -> State:
        """`state` with the next device of class k in the next cell."""
        task, cells = self.task, state.cells
        device = task.classes[k][len(task.classes[k]) - state.left[k]]
        left = (*state.left[:k], state.left[k] - 1, *state.left[k + 1:])
        cell = len(cells) % task.width
        base, whole = len(cells) - cell, cell + 1 == task.width
        rungs = tuple(self.rings.joined(rung, each, tuple(cells[base + c] for c in each.before[cell]), device)
                      for rung, each in zip(state.rungs, task.rings, strict=True))
        cut = (self.columns.crossed(state.cut, cells[base - task.width + cell], device)
               if self.turns and base else state.cut)
        found = State((*cells, device), left, state.sum, state.most, state.cuts, cut, rungs)
        return self._cut(found, self.columns.seconds(cut)) if whole and base and self.turns else found

    def certain(self, state: State) -> float:
        """Seconds that a layout which begins so takes at least."""
        task = self.task
        coming, dearest = self.columns.ahead(state.cells, state.left)
        total, most = state.sum + coming, max(state.most, dearest)
        following, begun = self._following(state)
        total += following if begun else max(0.0, following - dearest)
        most = max(most, following)
        return (task.floor + task.send.each * total + task.send.slowest * most + self.rings.seconds(state)
                + self._around(state))

    def _around(self, state: State) -> float:
        """The least seconds of what goes from the first place to the last."""
        each, cells, width = self.task.around.each, state.cells, self.task.width
        if not each or len(cells) < width:
            return 0.0
        if len(cells) == self.task.size:
            return each * self.around.whole(cells[:width], cells[-width:])
        return each * self.around.following(cells[:width], (), self.around.begun, state.left) if (
            len(cells) <= self.task.size - width) else 0.0

    def _following(self, state: State) -> tuple[float, bool]:
        """What the first cut that is not in `state.sum` takes at least, and whether there are devices behind it."""
        width, cells, columns = self.task.width, state.cells, self.columns
        cell = len(cells) % width
        base = len(cells) - cell
        if not cell and state.cuts < base // width - 1:
            return columns.least(cells[-2 * width:-width], cells[-width:]), True
        if not base or len(cells) == self.task.size:
            return 0.0, False
        if self.turns:
            return columns.following(cells[base - width + cell:base], (), state.cut, state.left), cell > 0
        return columns.following(cells[base - width:base], cells[base:], state.cut, state.left), cell > 0

    # What is left off

    def _in_order(self, state: State, k: int) -> bool:
        """Whether class k may be next: rows and columns of the first place may be renamed, with one axis of all."""
        done = len(state.cells)
        if not self.turns:
            return done % self.task.width == 0 or k >= self.home[state.cells[-1]]
        return done >= self.task.width or all(k >= self.home[state.cells[c]] for c in self.lines[done])

    def _dominated(self, state: State) -> bool:
        """Whether another way to the same state costs no more, whatever follows; keeps this one else."""
        width = self.task.width
        last = [self.home[d] for d in state.cells[-width:]]
        first = [self.home[d] for d in state.cells[:width]] if self.task.around.each else []
        key = state.left, (min((tuple(last[c] for c in turn), tuple(first[c] for c in turn if first))
                               for turn in self.turns) if self.turns else tuple(sorted(last)))
        known = self.seen.setdefault(key, [])
        if any(self._excess(other, state) <= 0.0 for other in known):
            return True
        known.append(state)
        return False

    def _excess(self, one: State, other: State) -> float:
        """By how many seconds the first may turn out the dearer one."""
        send, uplink = self.task.send, self.task.links.uplink
        total = send.each * (one.sum - other.sum) + send.slowest * max(0.0, one.most - other.most)
        for ring, a, b in zip(self.task.rings, one.rungs, other.rungs, strict=True):
            busy = max((x - y) * up for x, y, up in zip(a.load, b.load, uplink, strict=True))
            total += (ring.fixed * max(0.0, a.latency - b.latency)
                      + ring.nbytes * max(0.0, a.inverse - b.inverse, busy))
        return total
