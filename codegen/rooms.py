"""Bytes that ops work in while they run, beside what goes in and what comes out: no graph has them.

    attention's backward on GPUs   the queries' gradient in fp32, its rows and columns rounded up to tiles, and a number
                                   a row, as FlashAttention-2 has them (Dao, 2023)
    a head in chunks               a chunk of logits, the weight filled up to the classes that go together on a GPU, and
                                   where no kernel is written for them the chunk's rows in fp32, twice if cast

Workspaces of convolutions and of matrix products are not told: libraries choose them as they run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from autopar.kernels.linear_cross_entropy import classes_worked_on

ROW_TILE, COLUMN_TILE = 128, 32
"""What rows and columns of a head are rounded up to."""
WIDE = 4
"""Bytes of a number in fp32."""
Room = Callable[[Sequence[Any], bool], float]


def room_of(name: str, args: Sequence[Any], fused: bool) -> float:
    """The bytes that the op called `name` works in on tensors `args`; `fused` as on GPUs."""
    return ROOMS[name](args, fused) if name in ROOMS else 0.0


def _attention(args: Sequence[Any], _: bool) -> float:
    """(gradient, query (B, H, Q, D), ...)"""
    query: Tensor = args[1]
    *batch, rows, width = query.shape
    tall, broad = -(-rows // ROW_TILE) * ROW_TILE, -(-width // COLUMN_TILE) * COLUMN_TILE
    return float(math.prod(batch) * tall * (broad + 1) * WIDE)


def _head(args: Sequence[Any], fused: bool) -> float:
    """(hidden (T, D), weight (C, D), bias, place, scale, rows, ...)"""
    hidden, weight, rows = args[0], args[1], min(args[5], len(args[0]))
    classes = classes_worked_on(len(weight)) if fused else len(weight)
    filled = 0 if classes == len(weight) else classes * weight.shape[1] * weight.element_size()
    narrow = hidden.element_size() < WIDE
    beside = 0 if fused else max(WIDE, hidden.element_size()) * (1 + narrow)
    return float(rows * classes * (hidden.element_size() + beside) + filled)


ROOMS: dict[str, Room] = {
    "_scaled_dot_product_flash_attention_backward": _attention,
    "_scaled_dot_product_cudnn_attention_backward": _attention,
    "_scaled_dot_product_efficient_attention_backward": _attention,
    "attention_with_dropout_backward": _attention,
    "linear_cross_entropy_in_chunks": _head,
    "linear_cross_entropy_apart": _head,
}
"""By name of an op, without namespace."""
