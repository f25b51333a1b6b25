"""Matmuls, memory and launches of each device, while all devices are busy with the same."""

from __future__ import annotations

import dataclasses
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from autopar.core.device import Device, Dtype, Flops
from autopar.core.presets import MACHINES
from autopar.launch import kind_of
from autopar.measure.crew import MOST_CALLS, Crew

DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALIKE = 1.15
"""How many times another a figure of two devices of one kind may be for them to count as equal."""
_FIGURES = ("efficiency", "memory_bytes", "memory_bytes_per_s", "launch_s")


def devices(crew: Crew) -> tuple[Device, ...]:
    """The devices of all ranks; of those of one kind that are alike each figure is the median. Collective."""
    crew.meet()
    hosts = crew.objects(f"{socket.gethostname()} {_boot()}")
    found = crew.objects(_device(crew, hosts.count(hosts[crew.rank])))
    return evened(shared(found, hosts) if crew.device.type == "cpu" else tuple(found))


def shared(found: Sequence[Device], hosts: Sequence[str]) -> tuple[Device, ...]:
    """Processes of one host are one device: they share its cores, and what tells them apart is chance."""
    return tuple(_median([device for device, other in zip(found, hosts, strict=True) if other == host])
                 for host in hosts)


def evened(found: tuple[Device, ...]) -> tuple[Device, ...]:
    """Devices of one kind with the medians of their figures, unless a figure of two of them is too far apart."""
    kinds = {device.kind: [other for other in found if other.kind == device.kind] for device in found}
    median = {kind: _median(alike) for kind, alike in kinds.items()
              if all(max(figures) <= ALIKE * min(figures) for figures in _columns(alike))}
    return tuple(median.get(device.kind, device) for device in found)


def described(kind: str, rates: dict[Dtype, float], best: dict[Dtype, float], memory: tuple[float, float],
              launch_s: float) -> Device:
    """A device that reaches `rates` of FLOP/s; `memory` in bytes and bytes a second.

    Its peaks are the published ones, else the `best` that any matmul reached. One efficiency stands for all dtypes:
    that of the dtype which comes closest to its peak, and the peaks of the others are lowered to what gives their rate.
    """
    published: dict[str, float] = MACHINES[kind].device.peak.table() if kind in MACHINES else {}
    efficiency = min(1.0, max(rate / published.get(dtype, best[dtype]) for dtype, rate in rates.items()))
    peak = Flops(**{dtype: rate / efficiency for dtype, rate in rates.items()})
    return Device(kind, peak, efficiency, *memory, launch_s)


def _device(crew: Crew, sharing: int) -> Device:
    """This rank's device, whose memory is shared by so many ranks where it is the host's."""
    rates: dict[Dtype, float] = {}
    best: dict[Dtype, float] = {}
    for dtype, shapes in crew.effort.matmuls.items():
        found = [_matmul_rate(crew, shape, DTYPES[dtype]) for shape in shapes]
        rates[dtype], best[dtype] = statistics.median(found), max(found)
    memory = _memory_bytes(crew.device, sharing), _memory_bytes_per_s(crew)
    one = torch.zeros(1, device=crew.device)
    return described(kind_of(crew.device), rates, best, memory, _seconds(crew, lambda: one.add_(1.0)))


def _matmul_rate(crew: Crew, shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """FLOP/s of an (m, k) by (k, n) product of random numbers: zeros take less power and run faster."""
    m, k, n = shape
    a, b = (torch.randn(sizes, device=crew.device).to(dtype) for sizes in ((m, k), (k, n)))
    return 2.0 * m * k * n / _seconds(crew, lambda: a @ b)


def _memory_bytes_per_s(crew: Crew) -> float:
    source = crew.noise(crew.effort.copy_bytes)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _seconds(crew, lambda: target.copy_(source))


def _seconds(crew: Crew, call: Callable[[], object]) -> float:
    """Seconds of one `call` on this rank: the median over batches, the first call not counted."""
    def batch(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        crew.finish()
        return (time.perf_counter() - start) / calls
    batch(1)
    calls = max(1, min(MOST_CALLS, round(crew.effort.batch_s / batch(1))))
    return statistics.median(batch(calls) for _ in range(crew.effort.repeats))


def _memory_bytes(device: torch.device, sharing: int) -> float:
    """Bytes that this process can have: what is free on its device and what it holds of it already."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    return _free_host_bytes() / sharing


def _free_host_bytes() -> float:
    """Bytes of this host that processes can still have, by /proc where there is one, within the control group's limit.
    """
    told = Path("/proc/meminfo")
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines()) if told.exists() else {}
    free = 1024.0 * int(lines["MemAvailable"].split()[0]) if "MemAvailable" in lines else (
        float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    group = Path("/sys/fs/cgroup")
    limit, used = ((group / name) for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdecimal():
        free = min(free, float(limit.read_text()) - float(used.read_text()))
    return max(1.0, free)


def _boot() -> str:
    """What tells hosts of one name apart."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _columns(found: list[Device]) -> list[list[float]]:
    """Each figure of all devices."""
    rates = [[device.matmul_flops(dtype) for device in found] for dtype in DTYPES]
    return rates + [[getattr(device, name) for device in found] for name in _FIGURES[1:]]


def _median(found: list[Device]) -> Device:
    efficiency = statistics.median(device.efficiency for device in found)
    peak = Flops(*(statistics.median(device.matmul_flops(dtype) for device in found) / efficiency for dtype in DTYPES))
    figures = {name: statistics.median(getattr(device, name) for device in found) for name in _FIGURES[1:]}
    return dataclasses.replace(found[0], peak=peak, efficiency=efficiency, **figures)
