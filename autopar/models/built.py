"""A model with everything a planner needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]
"""A tuple of positional or a dict of keyword arguments, their tensors of the global batch's shapes."""
LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class BuiltModel:
    """`model` in train mode; it returns its loss, unless `loss_fn(output, target)`, the last input the target, does."""

    name: str
    model: nn.Module
    inputs: Inputs
    loss_fn: LossFn | None = None

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs as (args, kwargs)."""
        return ((), dict(self.inputs)) if isinstance(self.inputs, dict) else (self.inputs, {})


def tokens(batch: int, seq: int) -> dict[str, Tensor]:
    """Token ids and labels of (batch, seq) on meta, under the names that transformers gives them."""
    ids = torch.empty((batch, seq), dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": torch.empty_like(ids)}


def images(batch: int, size: int) -> tuple[Tensor, Tensor]:
    """(batch, 3, size, size) images and their classes, on meta."""
    return torch.empty((batch, 3, size, size), device="meta"), torch.empty(batch, dtype=torch.long, device="meta")
