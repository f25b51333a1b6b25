"""The physical devices and links, and what collectives cost on them."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from autopar.core.collectives import Pricer, rates
from autopar.core.device import Device, device_from_json, require_positive
from autopar.core.errors import AutoparError
from autopar.core.figures import check_device, check_figure, check_index, check_matrix
from autopar.core.files import entries, entry, typed, write_whole
from autopar.core.measured import Measured, check_measured, measured_from_json
from autopar.core.mesh import Mesh
from autopar.core.presets import check_devices, parse_preset
from autopar.core.reading import check_path, read_as
from autopar.core.reshard import Primitive

FORMAT = "autopar cluster 2"
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Cluster:
    """`devices[i]` is on host `hosts[i]` and in row `rows[i]` of the link matrices, seconds and bytes a second one way.

    Devices of one row are alike in their links and the diagonal is the link between two of them: a row is a host
    where the links within a host are equal, a device where every pair was measured. `uplink_bytes_per_s[h]` is
    what all devices of host h together send to other hosts. `collectives` are those that were measured.
    """

    name: str
    devices: tuple[Device, ...]
    hosts: tuple[int, ...]
    rows: tuple[int, ...]
    latency_s: Matrix
    bytes_per_s: Matrix
    uplink_bytes_per_s: tuple[float, ...]
    collectives: tuple[Measured, ...] = ()

    def __post_init__(self) -> None:
        if not self.devices:
            raise AutoparError(f"cluster {self.name} has no devices, needed is at least one")
        check_devices(self.name, self.size)
        check_index("hosts", self.hosts, self.size, len(self.uplink_bytes_per_s))
        check_index("rows", self.rows, self.size, len(self.latency_s))
        check_matrix("latency_s", self.latency_s, len(self.latency_s))
        check_matrix("bytes_per_s", self.bytes_per_s, len(self.latency_s))
        for host, rate in enumerate(self.uplink_bytes_per_s):
            check_figure("uplink_bytes_per_s", f"[{host}]", rate)
        for device in dict.fromkeys(self.devices):
            check_device(device)
        check_measured(self.collectives, self.size)

    def __hash__(self) -> int:
        return hash((self.name, self.size, self.latency_s[0], self.bytes_per_s[0]))

    def __str__(self) -> str:
        return f"{self.name} ({self.size} devices on {len(set(self.hosts))} hosts)"

    @property
    def size(self) -> int:
        """The number of devices."""
        return len(self.devices)

    def latency(self, source: int, target: int) -> float:
        """Seconds for a message from device `source` to arrive at device `target`."""
        return self.latency_s[self.rows[source]][self.rows[target]]

    def bandwidth(self, source: int, target: int) -> float:
        """Bytes a second from device `source` to device `target` while nothing else uses the way."""
        return self.bytes_per_s[self.rows[source]][self.rows[target]]

    def pricer(self, mesh: Mesh) -> Pricer:
        """Seconds of any collective on `mesh`, for `reshard.cheapest_path`. Raises AutoparError if devices lack."""
        return _pricer(self, mesh)

    def collective_seconds(self, primitive: Primitive, mesh: Mesh, axes: tuple[int, ...], nbytes: float) -> float:
        """Seconds of one collective over ascending `axes`; `nbytes` of the larger of its two local tensors."""
        return _pricer(self, mesh)(primitive, axes, nbytes)

    def key(self) -> str:
        """Twelve hexadecimal digits that stand for the contents, whatever the name."""
        return _key(self)

    def to_json(self) -> dict[str, Any]:
        """The cluster as numbers and lists with units in the names; a run of equal devices is counted."""
        devices = [{"count": len(list(run)), **device.to_json()} for device, run in itertools.groupby(self.devices)]
        return {"format": FORMAT, "name": self.name, "devices": devices,
                **{name: getattr(self, name) for name in ("hosts", "rows", "latency_s", "bytes_per_s",
                                                          "uplink_bytes_per_s")},
                "collectives": [found.to_json() for found in self.collectives]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cluster:
        """The inverse of `to_json`. Raises AutoparError naming what is missing, of the wrong kind or out of range."""
        if entry(typed("a cluster", data, dict), "format", str) != FORMAT:
            raise AutoparError(f"'format' is {data['format']!r}, needed is {FORMAT!r}, which tells of measured "
                               "collectives; measure the cluster again")
        return cls(entry(data, "name", str), _devices(data), entries(data, "hosts", int), entries(data, "rows", int),
                   _matrix(data, "latency_s"), _matrix(data, "bytes_per_s"), entries(data, "uplink_bytes_per_s", float),
                   tuple(map(measured_from_json, entries(data, "collectives", dict))))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `path` whole or not at all."""
        write_whole(check_path("the path of a cluster", path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Cluster:
        """The cluster that `save` wrote to `path`. Raises AutoparError naming the file and what is wrong with it."""
        return read_as("a cluster", path, cls.from_json)

    @classmethod
    def measure(cls, name: str | None = None) -> Cluster:
        """The cluster as all ranks of the job find it, each its device, by the backend that runs: takes up to a minute.

        Collective, and the same on every rank. Joins the process group if that is still to be done. Raises AutoparError
        on every rank with fewer than two, or when one is lost meanwhile.
        """
        # By name, as core knows nothing of torch, and measuring is what brings it.
        measured: Cluster = importlib.import_module("autopar.measure.cluster").measure(name)
        return measured

    @classmethod
    def preset(cls, text: str) -> Cluster:
        """`[nodes x] devices x type` such as 2x8xA100-80GB, or `cpu:N`. Raises AutoparError for anything else.

        The link between hosts is all of a host's network cards together: groups that cross at once share it.
        """
        nodes, devices, machine = parse_preset(text)
        hosts, uplink = tuple(i // devices for i in range(nodes * devices)), machine.uplink_bytes_per_s(devices)
        return cls(text, (machine.device,) * len(hosts), hosts, hosts,
                   _two_tiers(nodes, machine.within.latency_s, machine.nic.latency_s),
                   _two_tiers(nodes, machine.within.bytes_per_s, uplink), (uplink,) * nodes)


def _two_tiers(size: int, within: float, between: float) -> Matrix:
    row = (between,) * size
    return tuple((*row[:i], within, *row[i + 1:]) for i in range(size))


def _matrix(data: dict[str, Any], name: str) -> Matrix:
    rows = entries(data, name, list)
    lacking = next(((i, j) for i, row in enumerate(rows) for j, value in enumerate(row) if value is None), None)
    if lacking:
        raise AutoparError(f"{name}[{lacking[0]}][{lacking[1]}] is null: that link is missing; measure the cluster "
                           "again with all ranks, or write its figure")
    return tuple(tuple(typed(f"{name}[{i}][{j}]", value, float) for j, value in enumerate(row))
                 for i, row in enumerate(rows))


def _devices(data: dict[str, Any]) -> tuple[Device, ...]:
    runs, hosts = entries(data, "devices", dict), len(entry(data, "hosts", list))
    counts = [entry(run, "count", int) for run in runs]
    require_positive("count of devices", counts)
    if sum(counts) != hosts:
        raise AutoparError(f"the counts of devices come to {sum(counts)}, needed is one a host entry, {hosts}")
    return tuple(itertools.chain(*map(itertools.repeat, map(device_from_json, runs), counts)))


@lru_cache(maxsize=64)
def _key(cluster: Cluster) -> str:
    contents = {name: value for name, value in cluster.to_json().items() if name != "name"}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:12]


@lru_cache(maxsize=4096)
def _pricer(cluster: Cluster, mesh: Mesh) -> Pricer:
    if max(mesh.devices) >= cluster.size or min(mesh.devices) < 0:
        raise AutoparError(f"mesh {mesh} needs device {max(mesh.devices)}, but cluster {cluster} numbers its devices "
                           f"0 to {cluster.size - 1}; choose a smaller mesh")
    key = f"{cluster.key()} {mesh} {hashlib.sha256(repr(mesh.devices).encode()).hexdigest()[:12]}"
    return Pricer(key, rates(cluster, mesh))
