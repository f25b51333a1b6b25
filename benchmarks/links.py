"""Measure one GPU host under links of five kinds, and print them beside what they are known to do.

    torchrun --standalone --nproc-per-node 4 benchmarks/links.py --links two-hosts --out results/

`--links` sets NCCL's variables before anything starts: NVLink as it is, shared memory, TCP over the loopback, or two
hosts of half the ranks each, in order or interleaved. The claims: bandwidths of 512 MiB within 10 % of those known for
four H200s, the hosts recognised, in at most 60 s. Without GPUs the same runs over gloo, where no claim is made.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import autopar
from autopar.console.cluster_report import BUS, as_text, table
from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.core.reshard import Primitive

NBYTES = 512 * 2**20
LOOPBACK = {"NCCL_SOCKET_IFNAME": "lo"}
CLOSE, MOST_SECONDS = 0.10, 60.0


@dataclass(frozen=True, slots=True)
class Known:
    """Bus GB/s of 512 MiB over all four H200s and between two, within a host and across, and µs of small messages."""

    all_reduce: float
    all_gather: float
    within: float
    across: float | None
    small_us: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Links:
    """NCCL's variables for a rank of so many, the host that each rank is then on, and what is known."""

    variables: Callable[[int, int], dict[str, str]]
    host: Callable[[int, int], int]
    known: Known


def _fixed(**variables: str) -> Callable[[int, int], dict[str, str]]:
    return lambda rank, size: variables


def _hosts(host: Callable[[int, int], int]) -> Callable[[int, int], dict[str, str]]:
    return lambda rank, size: {"NCCL_HOSTID": f"host{host(rank, size)}", **LOOPBACK}


def _one(rank: int, size: int) -> int:
    return 0


def _halves(rank: int, size: int) -> int:
    return rank * 2 // size


def _alternating(rank: int, size: int) -> int:
    return rank % 2


ENVIRONMENTS: dict[str, Links] = {
    "nvlink": Links(_fixed(), _one, Known(347, 316, 257, None, (24, 29))),
    "shm": Links(_fixed(NCCL_P2P_DISABLE="1"), _one, Known(27, 27, 36, None, (31, 38))),
    "tcp": Links(_fixed(NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1", **LOOPBACK), _one,
                 Known(4.4, 4.4, 5.1, None, (50, 106))),
    "two-hosts": Links(_hosts(_halves), _halves, Known(6.3, 7.1, 52, 5.8, (24, 57))),
    "two-hosts-interleaved": Links(_hosts(_alternating), _alternating, Known(6.7, 8.2, 52, 6.0, (24, 56))),
}


def bus(cluster: Cluster, primitive: Primitive) -> float:
    """Bus GB/s of 512 MiB over all devices."""
    seconds = cluster.collective_seconds(primitive, Mesh((cluster.size,)), (0,), NBYTES)
    return BUS[primitive](cluster.size) * NBYTES / seconds / 1e9


def pair(cluster: Cluster, hosts: tuple[int, ...], same: bool) -> float | None:
    """The median GB/s between two devices of one host, or of two; None where there are no such."""
    pairs = itertools.permutations(range(cluster.size), 2)
    rates = [cluster.bandwidth(i, j) / 1e9 for i, j in pairs if (hosts[i] == hosts[j]) is same]
    return statistics.median(rates) if rates else None


def report(name: str, cluster: Cluster, took: float, claims: bool) -> str:
    """What was found and what is known, and whether the claims hold where they are made."""
    links = ENVIRONMENTS[name]
    hosts, known = tuple(links.host(rank, cluster.size) for rank in range(cluster.size)), links.known
    rows = [["", "GB/s", "known of H200s", "ratio", f"within {CLOSE:.0%}"]]
    for what, found, wanted in (("all-reduce", bus(cluster, "all_reduce"), known.all_reduce),
                                ("all-gather", bus(cluster, "all_gather"), known.all_gather),
                                ("pair in a host", pair(cluster, hosts, True), known.within),
                                ("pair across", pair(cluster, hosts, False), known.across)):
        if found is not None and wanted is not None:
            held = "-" if not claims else "yes" if abs(found / wanted - 1) <= CLOSE else "no"
            rows.append([what, f"{found:.4g}", f"{wanted:g}", f"{found / wanted:.3f}", held])
    small = [1e6 * each.curve.fixed_s for each in cluster.collectives]
    lines = [table(rows),
             f"small messages: {min(small):.0f} to {max(small):.0f} µs, known {known.small_us[0]} to "
             f"{known.small_us[1]}",
             f"hosts found: {' '.join(map(str, cluster.hosts))}, set: {' '.join(map(str, hosts))}, "
             f"{'recognised' if cluster.hosts == hosts else 'NOT recognised'}",
             f"took {took:.1f} s, at most {MOST_SECONDS:g}"]
    largest = min(each.curve.knot_bytes[-1] for each in cluster.collectives)
    if largest < NBYTES:
        lines.append(f"extrapolated from {largest / 2**20:g} MiB, the largest that was measured of every collective")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--links", choices=ENVIRONMENTS, default="nvlink")
    parser.add_argument("--out", type=Path, help="a folder for the cluster's file, links-NAME.json")
    arguments = parser.parse_args()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.update(ENVIRONMENTS[arguments.links].variables(rank, size))
    autopar.init()
    start = time.perf_counter()
    cluster = Cluster.measure(f"{arguments.links} of {size}")
    took = time.perf_counter() - start
    if rank == 0:
        where = torch.cuda.get_device_name() if dist.get_backend() == "nccl" else "CPU ranks over gloo"
        found = report(arguments.links, cluster, took, torch.cuda.is_available())
        print(f"{arguments.links}: {size} x {where}, torch {torch.__version__}", found, as_text(cluster), sep="\n\n",
              flush=True)
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            cluster.save(arguments.out / f"links-{arguments.links}.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
