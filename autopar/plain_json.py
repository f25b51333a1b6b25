"""Plain values in JSON, which by itself has no tuples, no tensors and no dicts with keys other than strings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.core.errors import AutoparError


def encode(value: Any, what: str) -> Any:
    """`value` as JSON can hold it. Raises AutoparError, naming `what` it belongs to, for what is not plain."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(v, what) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(v, what) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, what), encode(v, f"{what}.{k}")] for k, v in value.items()]}
    if isinstance(value, Tensor) and not isinstance(value, DTensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    raise AutoparError(f"{what} holds a {type(value).__name__}, which can't be saved; give numbers, strings, tensors, "
                       "and lists, tuples or dicts of them")


def decode(data: Any) -> Any:
    """The inverse of `encode`; a tensor comes back on the CPU, a subclass as what it is one of."""
    if isinstance(data, list):
        return [decode(v) for v in data]
    if not isinstance(data, dict):
        return data
    if "tuple" in data:
        return tuple(decode(v) for v in data["tuple"])
    if "tensor" in data:
        return torch.tensor(data["tensor"], dtype=getattr(torch, data["dtype"]))
    return {decode(k): decode(v) for k, v in data["dict"]}
