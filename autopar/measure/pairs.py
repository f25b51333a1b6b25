"""Every link by itself: a message one way and a short one back, timed by the rank that sends first.

With latency α_ij and β_ij seconds a byte, n bytes from i to j and s back take α_ij + n · β_ij + α_ji + s · β_ji. Half
of the shortest exchange is the latency of either way, and what the longest takes more than it, per byte, is β_ij.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist

from autopar.measure.crew import Crew

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Links:
    """Seconds and bytes a second from rank to rank; of no meaning on the diagonal, where both are 0."""

    latency_s: Matrix
    bytes_per_s: Matrix


def links(crew: Crew, done: Callable[[], None]) -> Links:
    """All pairs, one after another; `done` after each. Collective."""
    latency = [[0.0] * crew.size for _ in range(crew.size)]
    rate = [[0.0] * crew.size for _ in range(crew.size)]
    for i, j in itertools.permutations(range(crew.size), 2):
        points = crew.points(crew.effort.pair_bytes, partial(_exchange, crew, i, j))
        latency[i][j], rate[i][j] = line(points)
        done()
    return Links(tuple(map(tuple, latency)), tuple(map(tuple, rate)))


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Latency in seconds, and bytes a second, of exchanges by bytes; see the module."""
    (least, before), (most, after) = points[0], points[-1]
    rate = (most - least) / (after - before) if after > before else most / after
    return before / 2.0, rate


def _exchange(crew: Crew, i: int, j: int, nbytes: int) -> Callable[[], object]:
    """What this rank does while i sends `nbytes` to j and j the least size back."""
    if crew.rank not in (i, j):
        return lambda: None
    there, back = crew.noise(nbytes), crew.noise(crew.effort.pair_bytes[0])
    first, second, peer = (dist.isend, dist.irecv, j) if crew.rank == i else (dist.irecv, dist.isend, i)

    def exchange() -> None:
        transfer(dist.P2POp(first, there, peer, crew.group))
        transfer(dist.P2POp(second, back, peer, crew.group))

    return exchange


def transfer(*operations: dist.P2POp) -> None:
    """Do them at once and wait; on NCCL over the group's own connections, where single ones open one for each pair."""
    for work in dist.batch_isend_irecv(list(operations)):
        work.wait()
