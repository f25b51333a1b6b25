"""Which samples of a dataset a rank needs."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DistributedSampler

from autopar.codegen.communicator import Axes, Communicator


def sampler_over(axes: Axes, communicator: Communicator, dataset: Any, shuffle: bool, seed: int,
                 drop_last: bool) -> DistributedSampler[Any]:
    """torch's sampler in which ranks that differ along `axes` get different samples, and all others the same.

    `num_replicas` are the parts of the batch: each rank's batch size is the global one over it.
    """
    index = communicator.group(axes).index
    return DistributedSampler(dataset, communicator.mesh.extent(axes), index, shuffle, seed, drop_last)
