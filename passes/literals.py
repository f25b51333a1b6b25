"""Tensors that a forward writes out, such as `torch.tensor([1.0, 2.0])`, keep their values while it is traced on meta.

A forward is traced on `meta`, where nothing has a value. What it writes out for that device, because it asks for that
of an input or for none, is made on the CPU and moved: the program then holds the values as a constant. So are tensors
that it finds elsewhere, such as class weights that a loss function holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_WRITTEN = {torch.tensor, torch.as_tensor, torch.asarray}
_LIKE = {torch.Tensor.new_tensor}
_BY_VALUE = _WRITTEN | _LIKE
CPU, META = torch.device("cpu"), torch.device("meta")


class Literals(TorchFunctionMode):
    """Makes tensors that are given by their values on the CPU first where they would be made on meta.

    `default` is the device of those for which none is asked.
    """

    def __init__(self, default: torch.device) -> None:
        super().__init__()
        self._default = default

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if len(args) < 2 and not kwargs and function not in _BY_VALUE:
            return function(*args)  # nothing stands beside it
        named = dict(kwargs or {})
        if function not in _BY_VALUE:
            met = (*args, *named.values()) if _writes(function, named) else _met((*args, *named.values()))
            return function(*met[:len(args)], **dict(zip(named, met[len(args):], strict=True)))
        if any(isinstance(value, torch.Tensor) for value in args[-1:]):
            return function(*args, **named)
        own = args[0].device if function in _LIKE else self._default
        if torch.device(named.get("device") or own) != META:
            return function(*args, **named)
        return function(*args, **{**named, "device": CPU}).to(META)


def _met(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a call; beside tensors on meta those that come from the CPU, with their values."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not any(tensor.device == META for tensor in tensors):
        return values
    return tuple(value.to(META) if isinstance(value, torch.Tensor) and value.device == CPU and value.ndim else value
                 for value in values)


def _writes(function: Callable[..., Any], named: dict[str, Any]) -> bool:
    """Whether a function writes to an argument, which then must stay itself."""
    name = getattr(function, "__name__", "")
    in_place = name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return in_place or named.get("out") is not None
