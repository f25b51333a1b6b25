"""Tensors by the plain model's attributes: `model.lm_head.weight`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Under:
    """What stands for the plain module called `prefix`: it has its tensors and no more."""

    prefix: str
    names: frozenset[str]
    """Of all tensors of the model."""
    tensor: Callable[[str], Tensor]

    def __getattr__(self, name: str) -> Tensor | Under:
        full = f"{self.prefix}.{name}" if self.prefix else name
        if full in self.names:
            return self.tensor(full)
        if any(each.startswith(f"{full}.") for each in self.names):
            return Under(full, self.names, self.tensor)
        raise AttributeError(f"a compiled model has no {full!r}, only tensors under the plain model's names")
