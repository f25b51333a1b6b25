"""Evaluate a constant node on the CPU, without writing out what is the same along a dim.

A dim along which a value does not change is kept with stride 0, as `expand` makes it. Attention masks of shape
(batch, 1, queries, keys) cost queries x keys that way, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.passes.functional import value_of
from autopar.passes.rules.nodes import argument
from autopar.passes.rules.table import is_pointwise

aten = torch.ops.aten
ALONG_A_DIM = {aten.cumsum.default: (1, 0), aten.diff.default: (2, -1)}
"""Ops that mix one dim alone: where that dim is among the arguments, and its default."""


def evaluate(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of `node` for the values of its arguments."""
    args, kwargs, run = _on_cpu(args), _on_cpu(kwargs), cast(Callable[..., Any], node.target)
    if is_pointwise(node):
        small = [collapsed(a) if isinstance(a, Tensor) else a for a in args]
        return run(*small, **kwargs).expand(_shape(node))
    if node.target in ALONG_A_DIM:
        position, default = ALONG_A_DIM[node.target]
        dim = int(argument(node, position, "dim", default)) % len(_shape(node))
        small = [collapsed(a, keep=dim) if isinstance(a, Tensor) else a for a in args]
        return run(*small, **kwargs).expand(_shape(node))
    if node.target is aten.index.Tensor:
        return _index(args[0], list(args[1])).expand(_shape(node))
    return run(*args, **kwargs)


def collapsed(tensor: Tensor, keep: int = -1) -> Tensor:
    """The tensor with size 1 in every dim along which it does not change, dim `keep` left as it is."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0 and dim != keep:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _index(source: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Advanced indexing; along a dim where the source does not change, which index is taken does not matter."""
    same = [source.stride(d) == 0 for d in range(len(indices))]
    used = [i if i is None or not s else torch.zeros((1,) * i.ndim, dtype=i.dtype)
            for i, s in zip(indices, same, strict=True)]
    if any(i is None for i in used):
        used = list(indices)
    return source[tuple(slice(None) if i is None else collapsed(i) for i in used)]


def _shape(node: fx.Node) -> torch.Size:
    value = value_of(node)
    assert value is not None
    return value.shape


def _on_cpu(tree: Any) -> Any:
    return pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), tree)
