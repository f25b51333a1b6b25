"""Attention whose kernel draws its own dropout, from a seed: the same mask in every run of the same plan.

Fused kernels take no seed; they read the state of the device's generator. One opaque op sets that state, runs the
kernel and puts the state back, so that whoever recomputes it gets the same mask, and what the user draws is not
disturbed. The seed lies in host memory: to read one from the device would wait for the device's work. The mask is
distinct for each shard, so it depends on the plan: only attention that is decomposed draws by global element.

    query (B, H, Q, D), key (B, H, K, D), value (B, H, K, D), bias (B, H, Q, K) or none -> (B, H, Q, D)

all local, 16-bit and on CUDA. Flash attention takes those without a bias (Dao, "FlashAttention-2", 2023),
memory-efficient attention those with one (Rabe and Staats, 2021).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from autopar.codegen.private import FLASH, MEMORY_EFFICIENT, Kernel

ALIGNED = 8
"""The number of 16-bit elements that rows of what a kernel reads have to be a multiple of."""
LONGEST_HEAD = 256
"""The largest width of a head that the kernels take."""
_SHARDS = 1_000_003


def fits(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether a kernel takes tensors like these, whose devices don't matter."""
    widths = query.shape[-1], value.shape[-1]
    aligned = widths[0] == widths[1] <= LONGEST_HEAD and widths[0] % ALIGNED == 0
    rows = mask is None or mask.shape[-1] % ALIGNED == 0
    return query.dtype in (torch.bfloat16, torch.float16) and aligned and rows


class KernelAttention(nn.Module):
    """Attention with dropout by a fused kernel, this rank's shard being number `shard` of all different ones."""

    takes_host_seed = True

    def __init__(self, shard: int, salt: int) -> None:
        super().__init__()
        self.number = salt * _SHARDS + shard

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
                enable_gqa: bool = False, host_seed: Tensor) -> Tensor:
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
        out: Tensor = _forward(query, key, value, bias, host_seed, self.number, dropout_p, is_causal, scale)[0]
        return out

    def result(self, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        """An empty result, for shapes."""
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as what is added to the scores, (B, H, Q, K)."""
    if mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~mask, -math.inf)
    return mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])


def _kernel(bias: Tensor | None) -> Kernel:
    return FLASH if bias is None else MEMORY_EFFICIENT


@torch.library.custom_op("autopar::attention_with_dropout", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, seed: Tensor, number: int, rate: float,
             causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, the logarithm of the scores' sum, and the two parts of the kernel's own random state."""
    generator = torch.cuda.default_generators[query.device.index]
    before = generator.get_state()
    generator.manual_seed((int(seed) * _SHARDS + number) % 2**63)
    try:
        return _kernel(bias).forward(query, key, value, bias, rate, causal, scale)
    finally:
        generator.set_state(before)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, seed: Tensor, number: int, rate: float,
      causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _kernel(bias).forward(query, key, value, bias, rate, causal, scale)


@torch.library.custom_op("autopar::attention_with_dropout_backward", mutates_args=())
def _backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor,
              sums: Tensor, first: Tensor, second: Tensor, rate: float, causal: bool,
              scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return _kernel(bias).backward(gradient, query, key, value, bias, (out, sums, first, second), rate, causal, scale)


@_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, bias, _, _, ctx.rate, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, bias, *output)


def _differentiate(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    query, key, value, bias, *made = ctx.saved_tensors
    found = _backward(gradient, query, key, value, bias, *made, ctx.rate, ctx.causal, ctx.scale)
    return (*found, None, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
