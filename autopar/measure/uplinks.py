"""What all devices of a host together send to another host, while all hosts do so at once."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from autopar.measure.crew import Crew
from autopar.measure.pairs import Links, line, transfer
from autopar.measure.tiers import Hosts


def uplinks(crew: Crew, hosts: Hosts, alone: Links) -> tuple[float, ...]:
    """Bytes a second of each host: never less than the best of its links `alone`. Collective.

    With one host nothing crosses, and the figure is what its devices would send each by its best link.
    """
    members = [[rank for rank, host in enumerate(hosts) if host == h] for h in range(max(hosts) + 1)]
    best = [[max(rate for j, rate in enumerate(alone.bytes_per_s[i]) if j != i and (len(members) == 1 or
                                                                                   hosts[j] != hosts[i]))
             for i in ranks] for ranks in members]
    if len(members) == 1:
        return (sum(best[0]),)
    target = {rank: into[place % len(into)] for ranks, into in zip(members, members[1:] + members[:1], strict=True)
              for place, rank in enumerate(ranks)}
    _, rate = line(crew.points(crew.effort.pair_bytes, lambda nbytes: _crossing(crew, target, nbytes)))
    return tuple(max(*rates, len(rates) * rate) for rates in best)


def _crossing(crew: Crew, target: dict[int, int], nbytes: int) -> Callable[[], object]:
    """What this rank does while every rank sends `nbytes` to its target."""
    out = crew.noise(nbytes)
    coming = [(rank, crew.noise(nbytes)) for rank, to in target.items() if to == crew.rank]

    def cross() -> None:
        operations = [dist.P2POp(dist.isend, out, target[crew.rank], crew.group)]
        operations += [dist.P2POp(dist.irecv, into, rank, crew.group) for rank, into in coming]
        transfer(*operations)

    return cross
