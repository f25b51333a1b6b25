"""What the figures of a cluster may be."""

from __future__ import annotations

from autopar.core.device import Device, require_positive
from autopar.core.errors import AutoparError

SPANS: dict[str, tuple[float, float]] = {
    "latency_s": (1e-12, 1e2), "bytes_per_s": (1.0, 1e16), "uplink_bytes_per_s": (1.0, 1e16), "launch_s": (1e-12, 1e2),
    "peak_flops_per_s": (1.0, 1e20), "efficiency": (1e-9, 1.0), "memory_bytes": (1.0, 1e18),
    "memory_bytes_per_s": (1.0, 1e18), "knot_bytes": (1.0, 1e16), "knot_s": (1e-12, 1e6),
}
"""Figures beyond these are mistakes, most often of units, and more than the tolerances of a solver can tell apart."""
Matrix = tuple[tuple[float, ...], ...]


def check_figure(name: str, where: str, value: float) -> None:
    """Raises AutoparError for a figure that is not finite, not above 0 or beyond its span."""
    require_positive(f"{name}{where}", [value])
    if not _within(name, (value,)):
        least, most = SPANS[name]
        raise AutoparError(f"{name}{where} is {value:g}, needed is a figure from {least:g} to {most:g}; see whether it "
                           "is in the unit that the name says")


def check_device(device: Device) -> None:
    """Raises AutoparError when a figure of the device is none that a device has."""
    for name in ("launch_s", "efficiency", "memory_bytes", "memory_bytes_per_s"):
        check_figure(name, f" of device {device.kind}", getattr(device, name))
    for dtype, flops in device.peak.table().items():
        check_figure("peak_flops_per_s", f" of device {device.kind} in {dtype}", flops)


def check_index(what: str, values: tuple[int, ...], size: int, limit: int) -> None:
    """Raises AutoparError unless there are `size` values from 0 to `limit` - 1."""
    if len(values) != size or not all(0 <= value < limit for value in values):
        span = f" from {min(values)} to {max(values)}" if values else ""
        raise AutoparError(f"{what} has {len(values)} entries{span}, needed are {size}, one a device, from 0 to "
                           f"{limit - 1}")


def check_matrix(what: str, matrix: Matrix, size: int) -> None:
    """Raises AutoparError unless there are `size` rows of `size` figures, naming the first link that is wrong."""
    if len(matrix) != size or any(len(row) != size for row in matrix):
        raise AutoparError(f"{what} has rows of {sorted({len(row) for row in matrix})} entries and {len(matrix)} rows, "
                           f"needed are {size} of {size}, as many as latency_s has rows")
    for i, row in enumerate(matrix):
        if not _within(what, row):
            for j, value in enumerate(row):
                check_figure(what, f"[{i}][{j}]", value)


def _within(name: str, values: tuple[float, ...]) -> bool:
    """Whether all are in the span; a nan never is."""
    least, most = SPANS[name]
    return all(least <= value <= most for value in values)
