"""A cluster told to people: its devices, the matrix of its links, what collectives take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from autopar.core.cluster import Cluster
from autopar.core.device import Device
from autopar.core.measured import Groups, Measured
from autopar.core.reshard import Primitive

MOST_SHOWN = 16
"""Devices whose links are printed; of more, the first of these."""
BUS: dict[Primitive, Callable[[int], float]] = {
    "all_reduce": lambda n: 2.0 * (n - 1) / n, "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n, "all_to_all": lambda n: (n - 1) / n,
}
"""Bytes that pass a device's link over bytes of its larger tensor, so that rates compare with those of links."""


def as_text(cluster: Cluster) -> str:
    """All that is known of a cluster."""
    parts = [str(cluster), _devices(cluster), f"hosts of devices: {' '.join(map(str, cluster.hosts))}", _links(cluster)]
    if cluster.collectives:
        parts.append(_collectives(cluster.collectives))
    return "\n\n".join(parts)


def bus_bytes_per_s(measured: Measured) -> float:
    """Bytes a second of the largest messages on each device's link."""
    slope = measured.curve.s_per_byte
    return BUS[measured.primitive](len(measured.groups[0])) / slope if slope > 0 else float("inf")


def groups_text(groups: Groups) -> str:
    """Groups in one word each, such as `0,1 2,3`; of many the first."""
    shown = [",".join(map(str, group)) for group in groups[:4]]
    return " ".join(shown) + (f" and {len(groups) - 4} more" if len(groups) > 4 else "")


def _devices(cluster: Cluster) -> str:
    rows = [["device", "", "fp32", "bf16", "fp16 TFLOP/s", "GB/s", "GiB", "launch µs"]]
    for device, run in itertools.groupby(range(cluster.size), lambda i: cluster.devices[i]):
        ranks = list(run)
        numbers = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        rows.append([numbers, device.kind, *_figures(device)])
    return table(rows)


def _figures(device: Device) -> list[str]:
    rates = [f"{device.matmul_flops(dtype) / 1e12:.3g}" for dtype in ("fp32", "bf16", "fp16")]
    return [*rates, f"{device.memory_bytes_per_s / 1e9:.4g}", f"{device.memory_bytes / 2**30:.4g}",
            f"{1e6 * device.launch_s:.3g}"]


def _links(cluster: Cluster) -> str:
    shown = range(min(cluster.size, MOST_SHOWN))
    less = f", of the first {MOST_SHOWN} of {cluster.size} devices" if cluster.size > MOST_SHOWN else ""
    rates = [[f"{cluster.bandwidth(i, j) / 1e9:.3g}" if i != j else "-" for j in shown] for i in shown]
    latencies = [[f"{1e6 * cluster.latency(i, j):.3g}" if i != j else "-" for j in shown] for i in shown]
    return "\n".join([f"GB/s from row to column{less}:", _matrix(rates), "", f"latency in µs{less}:",
                      _matrix(latencies)])


def _matrix(cells: list[list[str]]) -> str:
    return table([["", *map(str, range(len(cells)))], *([str(i), *row] for i, row in enumerate(cells))])


def _collectives(found: Sequence[Measured]) -> str:
    rows = [["collective", "of", "groups that run at once", "α µs", "β ns/KiB", "bus GB/s", "lines", "misfit %"]]
    for each in found:
        curve = each.curve
        rows.append([each.primitive, str(len(each.groups[0])), groups_text(each.groups), f"{1e6 * curve.fixed_s:.3g}",
                     f"{1e9 * 1024 * curve.s_per_byte:.3g}", f"{bus_bytes_per_s(each) / 1e9:.3g}",
                     str(len(curve.knot_s) - 1), f"{100 * curve.misfit:.1f}"])
    return table(rows)


def table(rows: list[list[str]]) -> str:
    """Cells in columns, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)
