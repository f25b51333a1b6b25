"""Tensor parallelism as experts write it by hand: torch's DTensor styles on the blocks of a Hugging Face Llama.

Projections into a block are cut by columns, those out of it by rows, the head by classes. All ranks see the batches of
all, so that a step is of as many samples as that of any other row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

INTO, OUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def tensor(job: Any) -> Callable[..., Any]:
    """The model of `job` cut over all ranks, its blocks compiled; `job.batch` becomes that of all ranks.

    Raises ValueError for blocks of other layers, GPT-2's fused Conv1D among them, which these styles can't cut.
    """
    first = next(iter(job.batch.values()))
    mesh = init_device_mesh(first.device.type, (dist.get_world_size(),))
    for name in job.blocks:
        block = job.model.get_submodule(name)
        styles = {path: ColwiseParallel() if own in INTO else RowwiseParallel()
                  for path, module in block.named_modules() if isinstance(module, nn.Linear)
                  for own in [path.rpartition(".")[2]] if own in INTO + OUT}
        if not {path.rpartition(".")[2] for path in styles} >= {"q_proj", "o_proj"}:
            raise ValueError(f"{name} has no q_proj and o_proj that are linear layers: torch's styles can't cut it")
        parallelize_module(block, mesh, styles)
        block.compile()
    parallelize_module(job.model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    job.batch.update({key: gathered(value) for key, value in job.batch.items()})
    return job.model  # type: ignore[no-any-return]


def gathered(part: Tensor) -> Tensor:
    """The samples of all ranks."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)
