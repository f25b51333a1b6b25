"""Messages over a pipeline's cuts: what those that are known take, and what others take at least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from autopar.solver.grid import Cells, Cut, Send, Task, more
from autopar.solver.tiers import Ahead, Tier, least_cuts, tiers

ROUNDING = 1e-12


@dataclass(eq=False)
class Match:
    """The best order of columns behind a cut so far, and what it costs at least."""

    least: float
    seconds: float = math.inf
    columns: Cells = ()


class Columns:
    """What `send` takes over the cuts of a task; `begun` is a cut over which nothing is known."""

    def __init__(self, task: Task, send: Send) -> None:
        self.task, self.send, none = task, send, (0.0,) * len(task.links.uplink)
        self.begun = Cut(0.0, 0.0, none, none)
        self.cost = task.links.cost(1.0, send.nbytes)
        self.tiers: tuple[Tier, ...] = tiers(self.cost, task.classes)
        self.home = {d: k for k, each in enumerate(task.classes) for d in each}
        self.matched: dict[tuple[Cells, Cells], float] = {}
        self.coming: dict[tuple[object, ...], tuple[float, float]] = {}

    def crossed(self, cut: Cut, a: int, b: int) -> Cut:
        """`cut` with a message from device a to b."""
        links, out, into = self.task.links, cut.out, cut.into
        one, other = links.host[a], links.host[b]
        if one != other:
            out, into = more(out, one, 1.0), more(into, other, 1.0)
        return Cut(max(cut.latency, links.latency[a][b]), max(cut.inverse, links.inverse[a][b]), out, into)

    def seconds(self, cut: Cut) -> float:
        """Seconds of the messages over a cut."""
        uplink = self.task.links.uplink
        busy: float = max(cut.inverse, max(map(mul, cut.out, uplink)), max(map(mul, cut.into, uplink)))
        return cut.latency + self.send.nbytes * busy

    def whole(self, before: Cells, after: Cells) -> float:
        """Seconds over a cut whose columns are these."""
        cut = self.begun
        for a, b in zip(before, after, strict=True):
            cut = self.crossed(cut, a, b)
        return self.seconds(cut)

    def least(self, before: Cells, after: Cells) -> float:
        """What a cut between two places takes at least, whatever its columns."""
        return self.following(before, after, self.begun, (0,) * len(self.task.classes))

    def best(self, before: Cells, after: Cells) -> float:
        """The least seconds over a cut between two places whose columns may be any."""
        key = self._kinds(before), self._kinds(after)
        if key not in self.matched:
            self.matched[key] = self._match(before, after).seconds
        return self.matched[key]

    def aligned(self, cells: Cells) -> Cells:
        """The same places, the columns of each in the best order behind the one before."""
        width, found = self.task.width, cells[:self.task.width]
        for base in range(width, len(cells), width):
            found += self._match(found[-width:], cells[base:base + width]).columns
        return found

    def _kinds(self, devices: Cells) -> Cells:
        return tuple(sorted(self.home[d] for d in devices))

    def _match(self, before: Cells, after: Cells) -> Match:
        found = Match(self.least(before, after) * (1.0 + ROUNDING))
        self._try(before, after, self.begun, (), found)
        return found

    def _try(self, before: Cells, after: Cells, cut: Cut, columns: Cells, found: Match) -> None:
        """Take the order of `after` behind `columns` by which messages from `before` take the least seconds."""
        if not after:
            found.seconds, found.columns = self.seconds(cut), columns
            return
        options: dict[int, tuple[float, int, Cut]] = {}
        for device in after:
            if self.home[device] not in options:
                crossed = self.crossed(cut, before[len(columns)], device)
                options[self.home[device]] = self.seconds(crossed), device, crossed
        for seconds, device, crossed in sorted(options.values(), key=lambda option: option[:2]):
            if seconds < found.seconds * (1.0 - ROUNDING) and found.seconds > found.least:
                self._try(before, tuple(d for d in after if d != device), crossed, (*columns, device), found)

    def following(self, opened: Cells, after: Cells, cut: Cut, left: Sequence[int]) -> float:
        """The least seconds of a cut that is begun: columns `opened` go to devices `after`, or to some of those `left`
        of each class."""
        free, links = len(opened) - len(after), self.task.links
        kinds = [k for k, n in enumerate(left) if n]
        rest, last = [self.task.classes[k][-1] for k in kinds], sum(left) == free
        own, there, most = ([0] * len(links.uplink) for _ in range(3))
        for device in opened:
            own[links.host[device]] += 1
        for device in after:
            there[links.host[device]] += 1
        for k, device in zip(kinds, rest, strict=True):
            most[links.host[device]] += left[k]
        busy = cut.inverse
        for h, up in enumerate(links.uplink):
            leave, come = own[h] - there[h] - min(free, most[h]), there[h] - own[h] + (most[h] if last else 0)
            busy = max(busy, (cut.out[h] + max(0, leave)) * up, (cut.into[h] + max(0, come)) * up)
        return max(self._dearest(opened, (*after, *rest), after if not last else (*after, *rest)),
                   cut.latency + self.send.nbytes * busy)

    def _dearest(self, opened: Cells, targets: Cells, reached: Cells) -> float:
        """The dearest link that is there whatever column goes where: each of `opened` to some target, some of them to
        each that is reached."""
        cost = self.cost
        leaving = max((min(cost[a][b] for b in targets) for a in opened), default=0.0)
        return max(leaving, max((min(cost[a][b] for a in opened) for b in reached), default=0.0))

    def ahead(self, cells: Cells, left: tuple[int, ...]) -> tuple[float, float]:
        """The least that the cuts which are not begun cost, all together and the dearest of them."""
        task, done = self.task, len(cells)
        cell = done % task.width
        here = self._kinds(cells[done - (cell or task.width):]) if done else ()
        key = left, here
        if key not in self.coming:
            counts = [0] * len(task.classes)
            for k in here:
                counts[k] += 1
            ahead = Ahead(task.places - max(1, -(-done // task.width)), task.width,
                          (task.width - cell) if cell or not done else 0)
            self.coming[key] = least_cuts(self.tiers, ahead, left, counts)
        return self.coming[key]
