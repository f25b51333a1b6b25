"""A pipeline as experts write it by hand: torch's own 1F1B over stages of blocks, FSDP2 inside of a stage.

The stages are the hosts, or parts of them: ranks are ordered by host. A rank's batch is gathered with those of the
ranks that it hands values on to. The gradient of a weight that embedding and head share is summed over both stages.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor


class Part(nn.Module):
    """Consecutive blocks of a GPT-2 or Llama of Hugging Face, with the embedding on the first and the head on the last
    stage."""

    def __init__(self, model: nn.Module, blocks: range, first: bool, last: bool) -> None:
        super().__init__()
        inner: Any = model.transformer if hasattr(model, "transformer") else model.model
        every = inner.h if hasattr(inner, "h") else inner.layers
        self.blocks = nn.ModuleList(every[i] for i in blocks)
        self.wte = (inner.wte if hasattr(inner, "wte") else inner.embed_tokens) if first else None
        self.wpe = getattr(inner, "wpe", None) if first else None
        self.rotary = getattr(inner, "rotary_emb", None)
        self.norm = (inner.ln_f if hasattr(inner, "ln_f") else inner.norm) if last else None
        self.head: Any = model.lm_head if last else None

    def forward(self, x: Tensor) -> Tensor:
        if self.wte is not None:
            positions = torch.arange(x.shape[1], device=x.device)
            x = self.wte(x) + (self.wpe(positions) if self.wpe is not None else 0.0)
        extra: dict[str, Any] = {}
        if self.rotary is not None:
            extra["position_embeddings"] = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        for block in self.blocks:
            made = block(x, **extra)
            x = made[0] if isinstance(made, tuple) else made
        return x if self.norm is None else self.head(self.norm(x))


@dataclass
class _Output:
    loss: Tensor


def by_host() -> list[int]:
    """The ranks, those of one host together."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, os.environ.get("NCCL_HOSTID", "0"))
    return sorted(range(len(hosts)), key=lambda rank: (hosts[rank], rank))


def pipeline(stages: int, micro_batches: int) -> Callable[[Any], Callable[..., Any]]:
    """So many stages and micro-batches; makes a forward that runs the whole step, backward included."""
    def make(job: Any) -> Callable[..., Any]:
        device = next(iter(job.batch.values())).device
        mesh = DeviceMesh(device.type, torch.tensor(by_host()).reshape(stages, -1), mesh_dim_names=("stage", "shard"))
        place, group = mesh.get_local_rank("stage"), mesh.get_group("stage")
        count = len(job.blocks)
        blocks = range(place * count // stages, (place + 1) * count // stages)
        part = Part(job.model, blocks, place == 0, place == stages - 1).to(device)
        _prune(job.model, part)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in part.blocks:
            if device.type == "cuda":
                block.compile()
            fully_shard(block, mesh=mesh["shard"], mp_policy=policy, reshard_after_forward=False)
        fully_shard(part, mesh=mesh["shard"], mp_policy=policy, reshard_after_forward=False)
        loss_of = _loss if device.type != "cuda" else torch.compile(_loss)
        stage = PipelineStage(part, place, stages, device, group=group)
        schedule = Schedule1F1B(stage, micro_batches, loss_fn=loss_of)
        ends = dist.get_process_group_ranks(group)
        tie = _tie(mesh, stages)

        def forward(**batch: Tensor) -> _Output:
            ids, labels = (_gathered(batch[name], group, len(ends)) for name in ("input_ids", "labels"))
            if place == 0:
                schedule.step(ids)
            elif place == stages - 1:
                schedule.step(target=labels)
            else:
                schedule.step()
            _sum_tied(part, tie, job.model.config.tie_word_embeddings)
            return _Output(torch.zeros((), device=device, requires_grad=True))
        return forward
    return make


def _prune(model: Any, part: Part) -> None:
    """Leave of the model what its stage has, so that its parameters are the stage's."""
    for name in list(dict(model.named_children())):
        delattr(model, name)
    model.part = part


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _gathered(mine: Tensor, group: dist.ProcessGroup, ranks: int) -> Tensor:
    parts = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts)


def _tie(mesh: DeviceMesh, stages: int) -> dist.ProcessGroup | None:
    """This rank's group of first and last stage."""
    found = None
    for first, last in zip(mesh.mesh[0].tolist(), mesh.mesh[stages - 1].tolist(), strict=True):
        group = dist.new_group([first, last])
        found = group if dist.get_rank() in (first, last) else found
    return found


def _sum_tied(part: Part, tie: dist.ProcessGroup | None, tied: bool) -> None:
    if tie is None or not tied:
        return
    weight = part.wte.weight if part.wte is not None else part.head.weight
    grad = weight.grad
    dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=tie)
