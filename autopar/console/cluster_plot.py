"""A cluster drawn: the links as a matrix of colours, and the collectives as curves."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from autopar.console.cluster_report import groups_text
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.core.files import save_figure


def draw(cluster: Cluster, path: Path) -> None:
    """Write the drawing to `path`, in the format that its ending names.

    Raises AutoparError where matplotlib is not installed, can't write that format or can't write there.
    """
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise AutoparError("drawing needs matplotlib, which is not installed: pip install 'autopar[plot]'") from error
    figure = figures.Figure(figsize=(12.0, 5.0), layout="constrained")
    links, curves = figure.subplots(1, 2)
    _links(cluster, figure, links)
    _curves(cluster, curves)
    figure.suptitle(str(cluster))
    save_figure(figure, path, "choose a name such as links.png")


def _links(cluster: Cluster, figure: Any, axes: Any) -> None:
    devices = range(cluster.size)
    rates = [[cluster.bandwidth(i, j) / 1e9 if i != j else float("nan") for j in devices] for i in devices]
    image = axes.imshow(rates, cmap="viridis", norm="log")
    figure.colorbar(image, ax=axes, label="GB/s")
    axes.set(xlabel="to device", ylabel="from device", xticks=list(devices), yticks=list(devices), title="links")


def _curves(cluster: Cluster, axes: Any) -> None:
    for each in cluster.collectives:
        axes.plot(each.curve.knot_bytes, [1e3 * s for s in each.curve.knot_s], marker="o", markersize=3,
                  label=f"{each.primitive}  {groups_text(each.groups)}")
    axes.set(xscale="log", yscale="log", xlabel="bytes of the larger local tensor", ylabel="ms", title="collectives")
    if cluster.collectives:
        axes.legend(fontsize=6)
