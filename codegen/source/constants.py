"""Constant tensors as expressions: patterns where they are ones, else their bytes, compressed."""

from __future__ import annotations

import base64
import zlib

import torch
from torch import Tensor

from autopar.codegen.source.ops import Text, call

Shape = tuple[int, ...]
FEW = 32
"""Elements up to which numbers are written out."""


def constant_text(value: Tensor) -> Text:
    """An expression that makes `value`, bit for bit, on `rank.device`."""
    shape, dtype = list(value.shape), {"dtype": value.dtype, "device": Text("rank.device")}
    flat = value.reshape(-1)
    if flat.numel() and bool((flat == flat[0]).all()):
        return call("torch.full", (shape, flat[0].item()), dtype)
    count = torch.arange(flat.numel())
    if bool((flat == count).all()):
        made = call("torch.arange", (flat.numel(),), dtype)
        return made if value.ndim == 1 else call(f"{made}.reshape", tuple(shape) or ((),), {})
    if flat.numel() <= FEW and (not value.is_floating_point() or value.dtype == torch.float32):
        return call("torch.tensor", (value.tolist(),), dtype)
    raw = flat.contiguous().view(torch.uint8).numpy().tobytes()
    return call("unpacked", (base64.b64encode(zlib.compress(raw, 9)).decode(), shape, value.dtype, Text("rank.device")),
                {})


def unpacked(text: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor whose bytes are compressed in `text`."""
    raw = bytearray(zlib.decompress(base64.b64decode(text)))
    return torch.frombuffer(raw, dtype=dtype).reshape(shape).to(device)
