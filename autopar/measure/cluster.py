"""All of a cluster, measured: devices, links by pairs, tiers, uplinks, collectives."""

from __future__ import annotations

import json
from collections import Counter

from autopar import launch
from autopar.core.cluster import Cluster
from autopar.core.device import Device
from autopar.core.measured import Measured
from autopar.measure.crew import Crew, assembled
from autopar.measure.devices import devices
from autopar.measure.groups import RUN, collectives, partitions
from autopar.measure.pairs import links
from autopar.measure.progress import advancing, tell
from autopar.measure.tiers import recognised
from autopar.measure.uplinks import uplinks


def measure(name: str | None = None) -> Cluster:
    """The cluster of all ranks, the same on each; see `Cluster.measure`."""
    launch.init()
    with assembled() as crew:
        cluster = _measured(crew, name)
        text = crew.objects(json.dumps(cluster.to_json()) if crew.rank == 0 else "")[0]
    return Cluster.from_json(json.loads(text))


def _measured(crew: Crew, name: str | None) -> Cluster:
    parts = partitions(crew.size)
    found: list[Measured] = []
    with advancing(crew.rank, 2 + crew.size * (crew.size - 1) + len(RUN) * len(parts)) as advance:
        machines = devices(crew)
        advance("links")
        alone = links(crew, lambda: advance("links"))
        tiers = recognised(alone)
        crossing = uplinks(crew, tiers.hosts, alone)
        advance("collectives")
        for groups in parts:
            found += collectives(crew, groups, lambda: advance("collectives"))
    kinds = Counter(device.kind for device in machines)
    if len(set(machines)) > 1:
        tell(crew.rank, f"autopar: devices differ: {differences(machines)}; a plan is as slow as the slowest of them")
    title = name or f"measured {'+'.join(f'{count}x{kind}' for kind, count in kinds.items())}"
    return Cluster(title, machines, tiers.hosts, tiers.rows, tiers.links.latency_s, tiers.links.bytes_per_s, crossing,
                   tuple(found))


def differences(machines: tuple[Device, ...]) -> str:
    """Which ranks have which device, with what tells devices of one kind apart."""
    ranks: dict[Device, list[int]] = {}
    for rank, device in enumerate(machines):
        ranks.setdefault(device, []).append(rank)
    return ", ".join(f"rank {' '.join(map(str, where))} {device.kind} {device.matmul_flops('bf16') / 1e12:.3g} TFLOP/s "
                     f"in bf16, {device.memory_bytes_per_s / 1e9:.3g} GB/s, {device.memory_bytes / 2**30:.3g} GiB"
                     for device, where in ranks.items())
