"""What `autopar-cluster` does once its arguments are read."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from autopar import launch
from autopar.codegen.ranks import on_rank_zero
from autopar.console.cluster_options import Measure, Show
from autopar.console.cluster_plot import draw
from autopar.console.cluster_report import as_text
from autopar.console.options import writable
from autopar.core.cluster import Cluster


def measure(options: Measure) -> str:
    """Measure, write the file on rank 0, and return what rank 0 prints; nothing on the others. Raises AutoparError."""
    launch.init()
    on_rank_zero(lambda: str(writable(str(options.out))))  # before anything is measured
    cluster = Cluster.measure(options.name)
    on_rank_zero(lambda: _saved(cluster, options.out))
    return _told(cluster, options.json) if dist.get_rank() == 0 else ""


def show(options: Show) -> str:
    """What is known of the cluster, after drawing it where that is asked for. Raises AutoparError."""
    if options.plot is not None:
        draw(options.cluster, options.plot)
    return _told(options.cluster, options.json)


def _saved(cluster: Cluster, path: Path) -> str:
    cluster.save(path)
    return str(path)


def _told(cluster: Cluster, as_json: bool) -> str:
    return json.dumps(cluster.to_json()) if as_json else as_text(cluster)
