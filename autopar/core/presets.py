"""Published figures of common hosts, by the type that a preset names, and rough ones of local processes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from autopar.core.device import Device, Flops
from autopar.core.errors import AutoparError, UnknownName
from autopar.core.told import MOST, told

MOST_HOSTS = 1024
MOST_DEVICES = 16384
"""Devices of the largest cluster that is planned for: beyond it planning takes minutes and more."""
_HOSTS = re.compile(r"(?:([0-9]+)x)?([0-9]+)x([a-z][a-z0-9-]*)", re.IGNORECASE)
_PROCESSES = re.compile(r"cpu:([0-9]+)", re.IGNORECASE)
_FORM = "[nodes x] devices x type, such as 8xA100-80GB or 2x8xH100"
_DIGITS = 12
"""Digits of a count that are read: more than any cluster needs."""


@dataclass(frozen=True, slots=True)
class Link:
    """Seconds for a message to arrive, and bytes a second in one direction."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """A host full of equal devices: the link between any two, and network cards of `nic`, one for `per_nic` devices."""

    device: Device
    within: Link
    nic: Link
    per_nic: int

    def uplink_bytes_per_s(self, devices: int) -> float:
        """Bytes a second that a host of `devices` sends to others, all its cards together."""
        return self.nic.bytes_per_s * math.ceil(devices / self.per_nic)


# Dense peaks without sparsity; fp32 is the plain unit, not TF32; GB are 1e9 bytes; NVLink and PCIe rates are half of
# the datasheet's, which count both directions. NVIDIA datasheets: V100 (SXM2 32 GB; no bf16 unit, so fp32's rate),
# A100 (SXM4 40 GB and 80 GB, PCIe 80 GB), H100 (SXM5), H200 (SXM); Ada whitepaper (RTX 4090: tensor cores
# accumulating in fp32; no peer-to-peer, so traffic passes through host memory at half of PCIe 4.0 x16).
# Networks: DGX-1 (4 cards of 100 Gb/s InfiniBand for 8 devices), DGX A100 (8 of 200 Gb/s), DGX H100 and H200 (8 of
# 400 Gb/s); a PCIe-A100 host is assumed to have one of 100 Gb/s Ethernet, an RTX-4090 host one of 25 Gb/s.
LINK_EFFICIENCY = 0.8
"""The fraction of a link's published rate that collectives reach. Like the latencies, matmul efficiencies and launch
times below it is a rough figure of experience, not a published one."""


def _device(kind: str, peak: Flops, efficiency: float, memory_bytes: float, memory_bytes_per_s: float) -> Device:
    return Device(kind, peak, efficiency, memory_bytes, memory_bytes_per_s, launch_s=5e-6)


def _link(latency_s: float, published_bytes_per_s: float) -> Link:
    return Link(latency_s, published_bytes_per_s * LINK_EFFICIENCY)


_VOLTA, _AMPERE = Flops(15.7e12, 15.7e12, 125e12), Flops(19.5e12, 312e12, 312e12)
_HOPPER, _ADA = Flops(67e12, 989e12, 989e12), Flops(82.6e12, 165.2e12, 165.2e12)
_MACHINES = (
    Machine(_device("V100", _VOLTA, 0.75, 32e9, 900e9), _link(6e-6, 150e9), _link(8e-6, 12.5e9), 2),
    Machine(_device("A100-40GB", _AMPERE, 0.75, 40e9, 1555e9), _link(6e-6, 300e9), _link(8e-6, 25e9), 1),
    Machine(_device("A100-80GB", _AMPERE, 0.75, 80e9, 2039e9), _link(6e-6, 300e9), _link(8e-6, 25e9), 1),
    Machine(_device("PCIe-A100", _AMPERE, 0.7, 80e9, 1935e9), _link(8e-6, 32e9), _link(30e-6, 12.5e9), 8),
    Machine(_device("H100", _HOPPER, 0.65, 80e9, 3350e9), _link(6e-6, 450e9), _link(8e-6, 50e9), 1),
    Machine(_device("H200", _HOPPER, 0.65, 141e9, 4800e9), _link(6e-6, 450e9), _link(8e-6, 50e9), 1),
    Machine(_device("RTX-4090", _ADA, 0.8, 24e9, 1008e9), _link(16e-6, 16e9), _link(30e-6, 3.125e9), 8),
)
MACHINES: dict[str, Machine] = {machine.device.kind: machine for machine in _MACHINES}


def local_processes(count: int) -> Machine:
    """`count` gloo processes on one plain machine of two cores: they share cores, memory and its bandwidth, and what
    they send each other passes through that memory. All figures are rough: measure where they matter."""
    share = 1.0 / count
    device = Device("cpu", Flops(60e9 * share, 30e9 * share, 15e9 * share), 0.7, 16e9 * share, 20e9 * share, 10e-6)
    return Machine(device, Link(500e-6, 3e9 * share), Link(30e-6, 1.25e9), count)


def parse_preset(text: str) -> tuple[int, int, Machine]:
    """Hosts, devices a host, and what the hosts are: `[nodes x] devices x type` or `cpu:N`. Raises AutoparError."""
    if not isinstance(text, str):
        raise AutoparError(f"cluster is {told(text)}, needed is the text of a preset, {_FORM}")
    local, found = _PROCESSES.fullmatch(text), _HOSTS.fullmatch(text)
    counts = ("1", local[1]) if local else (found[1] or "1", found[2]) if found else ("0", "0")
    hosts, devices = (int(digits[:_DIGITS]) for digits in counts)
    shown = text if len(text) <= MOST else f"{text[:MOST]}..."
    if not (0 < hosts <= MOST_HOSTS and devices > 0):
        raise AutoparError(f"cluster {shown!r} is not of the form {_FORM} with 1 to {MOST_HOSTS} nodes, or cpu:N; "
                           f"types: {', '.join(sorted(MACHINES))}")
    check_devices(shown, hosts * devices)
    if local:
        return 1, devices, local_processes(devices)
    known = {name.lower(): machine for name, machine in MACHINES.items()}
    assert found is not None
    if found[3].lower() not in known:
        raise UnknownName("device type", found[3], list(MACHINES))
    return hosts, devices, known[found[3].lower()]


def check_devices(cluster: str, devices: int) -> None:
    """Raises AutoparError when there are more devices than can be planned for."""
    if devices > MOST_DEVICES:
        raise AutoparError(f"cluster {cluster} has {devices} devices, the most that can be planned for are "
                           f"{MOST_DEVICES}; plan for a smaller part of it")
