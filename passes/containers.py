"""Dataclasses among inputs and outputs, made known to torch so that their tensors are seen."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils import _pytree as pytree


def make_known(value: Any) -> None:
    """Register the type of every dataclass inside of `value` that is no container yet."""
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            make_known(leaf)
