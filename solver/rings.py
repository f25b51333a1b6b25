"""Collectives inside of a pipeline's places: what groups that are known take, and what others take at least."""

from __future__ import annotations

from collections import Counter
from operator import add, mul

from autopar.solver.grid import Cells, Load, Ring, Rung, State, Task, more
from autopar.solver.tiers import least_packed, tiers, widest

Whole = tuple[float, float, tuple[tuple[int, int], ...]]


class Rings:
    """The rings of a task."""

    def __init__(self, task: Task) -> None:
        self.task, links = task, task.links
        self.tiers = [tiers(links.cost(each.fixed, each.nbytes), task.classes) for each in task.rings]
        self.wide = widest(links.latency), widest(links.inverse)
        self.home = {d: k for k, each in enumerate(task.classes) for d in each}
        self.whole: dict[Cells, Whole] = {}
        self.coming: dict[tuple[object, ...], tuple[float, Load]] = {}

    def begun(self) -> tuple[Rung, ...]:
        """The groups before there are any."""
        return (Rung(0.0, 0.0, (0.0,) * len(self.task.links.uplink)),) * len(self.task.rings)

    def joined(self, rung: Rung, ring: Ring, members: Cells, device: int) -> Rung:
        """`rung` with `device` in the group of `members`."""
        if not members:
            return rung
        load = self._crossing(rung.load, members, device)
        if len(members) + 1 < ring.size:
            wide = [each[members[0]][device] for each in self.wide]
            return Rung(max(rung.latency, wide[0]), max(rung.inverse, wide[1]), load)
        latency, inverse, locals_ = self._whole((*members, device))
        for one, local in locals_ if len(locals_) > 1 else ():
            load = more(load, one, ring.load[local] - 1.0)
        return Rung(max(rung.latency, latency), max(rung.inverse, inverse), load)

    def _crossing(self, load: Load, members: Cells, device: int) -> Load:
        """`load` with 1 for each host whose uplink a group crosses now and did not before."""
        host = self.task.links.host
        mine, hosts = host[device], {host[m] for m in members}
        if hosts == {mine}:
            return load
        for one in ([mine] if mine not in hosts else []) + (list(hosts) if len(hosts) == 1 else []):
            load = more(load, one, 1.0)
        return load

    def _whole(self, members: Cells) -> Whole:
        """The worst latency and seconds a byte of a ring, and how many of it are on each host."""
        key = tuple(sorted(members))
        if key not in self.whole:
            links = self.task.links
            ordered = sorted(key, key=links.host.__getitem__)
            pairs = list(zip(ordered, ordered[1:] + ordered[:1], strict=True))
            self.whole[key] = (max(links.latency[a][b] for a, b in pairs), max(links.inverse[a][b] for a, b in pairs),
                               tuple(Counter(links.host[d] for d in key).items()))
        return self.whole[key]

    def seconds(self, state: State) -> float:
        """The least seconds of all rings, over the groups that there are and those to come."""
        return sum(self._least(i, state) for i in range(len(self.task.rings)))

    def _least(self, i: int, state: State) -> float:
        ring, rung = self.task.rings[i], state.rungs[i]
        packed, crossing = self._ahead(i, state)
        busy: float = max(map(mul, map(add, rung.load, crossing), self.task.links.uplink))
        return max(ring.fixed * rung.latency + ring.nbytes * max(rung.inverse, busy), packed)

    def _ahead(self, i: int, state: State) -> tuple[float, Load]:
        """The least seconds of groups that are not whole, and which hosts one more of them must cross."""
        ring, begun = self.task.rings[i], self._begun(self.task.rings[i], state.cells)
        key = i, state.left, begun
        if key not in self.coming:
            lacking = [0] * len(self.task.classes)
            for members in begun:
                lacking[self.home[members[0]]] += ring.size - len(members)
            self.coming[key] = (least_packed(self.tiers[i], ring.size, state.left, lacking),
                                self._must_cross(ring, begun, state.left))
        return self.coming[key]

    def _begun(self, ring: Ring, cells: Cells) -> tuple[Cells, ...]:
        """The groups of the last place that are begun and not whole."""
        base = len(cells) - len(cells) % self.task.width
        groups = dict[int, Cells]()
        for cell, before in enumerate(ring.before[:len(cells) - base]):
            members = tuple(cells[base + c] for c in (*before, cell))
            groups[members[0]] = members
        return tuple(sorted(members for members in groups.values() if len(members) < ring.size))

    def _must_cross(self, ring: Ring, begun: tuple[Cells, ...], left: Cells) -> Load:
        """1 for each host whose devices that are left don't come to whole groups, nor to one that crosses already."""
        host = self.task.links.host
        free, joined = [0] * len(self.task.links.uplink), set[int]()
        for k, n in enumerate(left):
            free[host[self.task.classes[k][0]]] += n
        for members in begun:
            hosts = {host[m] for m in members}
            if len(hosts) > 1:
                joined |= hosts
            else:
                free[host[members[0]]] -= ring.size - len(members)
        return tuple(0.0 if h in joined or (n >= 0 and n % ring.size == 0) else 1.0 for h, n in enumerate(free))
