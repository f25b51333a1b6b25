"""Constant tensors as expressions: patterns where they are ones, else their bytes, compressed."""

from __future__ import annotations

import base64
import zlib

import torch
from torch import Tensor

from autopar.codegen.source.ops import Text, call

Shape = tuple[int, ...]
FEW = 16
"""Elements up to which numbers are written out."""
_COLUMNS = 96
"""Characters of one piece of packed bytes."""


def constant_text(value: Tensor) -> Text:
    """An expression that makes `value`, bit for bit, on `rank.device`."""
    shape, dtype = list(value.shape), {"dtype": value.dtype, "device": Text("rank.device")}
    flat = value.reshape(-1)
    exact = value.dtype in (torch.bool, torch.int64, torch.int32, torch.float32)
    if exact and flat.numel() and _same(flat, flat[:1].expand(flat.shape)):
        return call("torch.full", (shape, flat[0].item()), dtype)
    if exact and value.dtype != torch.bool and _same(flat, torch.arange(flat.numel(), dtype=value.dtype)):
        made = call("torch.arange", (flat.numel(),), dtype)
        return made if value.ndim == 1 else call(f"{made}.reshape", tuple(shape) or ((),), {})
    if exact and flat.numel() <= FEW:
        return call("torch.tensor", (value.tolist(),), dtype)
    packed = base64.b64encode(zlib.compress(_bytes(flat), 9)).decode()
    pieces = tuple(packed[i:i + _COLUMNS] for i in range(0, len(packed), _COLUMNS))
    return call("unpacked", pieces, {"shape": tuple(shape), **dtype})


def unpacked(*pieces: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor whose bytes are compressed in `pieces`."""
    raw = bytearray(zlib.decompress(base64.b64decode("".join(pieces))))
    return (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).reshape(shape).to(device)


def _same(flat: Tensor, other: Tensor) -> bool:
    return _bytes(flat) == _bytes(other)


def _bytes(flat: Tensor) -> bytes:
    return flat.contiguous().view(torch.uint8).numpy().tobytes()
