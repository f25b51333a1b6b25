"""Training as experts write it by hand, for comparison: DDP, FSDP2, tensor parallelism and pipelines, compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from hand_pipeline import pipeline
from hand_tensor import tensor
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Job:
    """A plain model on its device in fp32, its blocks (dotted names), and this rank's batch.

    `loss(model, batch)` is the scalar loss.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    batch: dict[str, Tensor]
    loss: Callable[[Forward, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Way:
    """One way to train by hand: how to make it parallel, and what runs around the forward."""

    name: str
    parallel: Callable[[Job], Forward]
    around: Callable[[], Any] = field(default=contextlib.nullcontext)


def replace_blocks(job: Job, change: Callable[[nn.Module], nn.Module]) -> None:
    """Put `change(block)` in place of every block."""
    for name in job.blocks:
        parent, _, own = name.rpartition(".")
        holder = job.model.get_submodule(parent)
        setattr(holder, own, change(getattr(holder, own)))


def ddp(job: Job) -> Forward:
    """DistributedDataParallel under autocast around the whole model, compiled."""
    return DistributedDataParallel(torch.compile(job.model), gradient_as_bucket_view=True)


def ddp_recompute(job: Job) -> Forward:
    """The same with every block run again in the backward, blocks compiled one by one."""
    replace_blocks(job, checkpoint_wrapper)
    for name in job.blocks:
        job.model.get_submodule(name).compile()
    return DistributedDataParallel(job.model, gradient_as_bucket_view=True)


def fsdp(reshard: bool, recompute: bool = False, hosts: int = 1) -> Callable[[Job], Forward]:
    """FSDP2 with bf16 gathers and fp32 reductions; `reshard` is ZeRO-3, else ZeRO-2; `hosts` replicas."""
    def make(job: Job) -> Forward:
        world = dist.get_world_size()
        mesh = init_device_mesh("cuda", (hosts, world // hosts), mesh_dim_names=("replicate", "shard"))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if hasattr(job.model, "loss_function"):
            job.model.loss_function = torch.compile(job.model.loss_function)
            job.model.get_output_embeddings().compile()  # pads a vocabulary that no kernel likes
        if recompute:
            replace_blocks(job, checkpoint_wrapper)
        for name in job.blocks:
            block = job.model.get_submodule(name)
            block.compile()
            fully_shard(block, mesh=mesh if hosts > 1 else mesh["shard"], mp_policy=policy,
                        reshard_after_forward=reshard)
        fully_shard(job.model, mesh=mesh if hosts > 1 else mesh["shard"], mp_policy=policy, reshard_after_forward=False)
        return job.model
    return make


def _autocast() -> Any:
    return torch.autocast("cuda", torch.bfloat16)


def _kernel(backend: str, inner: Callable[[], Any] = contextlib.nullcontext) -> Callable[[], Any]:
    @contextlib.contextmanager
    def around() -> Any:
        with inner(), sdpa_kernel([BACKENDS[backend], SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    return around


WAYS = {way.name: way for way in (
    *(Way(f"{name} {backend}", make, _kernel(backend, _autocast)) for backend in BACKENDS for name, make in (
        ("ddp", ddp), ("ddp recompute", ddp_recompute), ("tensor", tensor))),
    *(Way(f"{name}{' recompute' * recompute} {backend}", fsdp(reshard, recompute, hosts), _kernel(backend))
      for backend in BACKENDS for recompute in (False, True) for name, reshard, hosts in (
          ("zero2", False, 1), ("zero3", True, 1), ("hsdp2", False, 2), ("hsdp3", True, 2))),
    *(Way(f"pp{stages} m{parts} {backend}", pipeline(stages, parts), _kernel(backend)) for backend in BACKENDS
      for stages in (2, 4) for parts in (4, 8, 16, 32)),
)}
