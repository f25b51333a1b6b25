"""What a model has to be before anything is made of it."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.codegen.runtime import ParallelModule
from autopar.core.errors import AutoparError
from autopar.deferred import DeferredModule
from autopar.passes.blame import check_model

PARALLEL = (ParallelModule, DeferredModule, nn.parallel.DistributedDataParallel)


def check_plain(model: nn.Module, loss_fn: Any) -> None:
    """Raises AutoparError unless `model` is a module as written, and `loss_fn` a function or None."""
    check_model(model, loss_fn)
    if isinstance(model, PARALLEL):
        raise AutoparError(f"model is a {type(model).__name__}, parallel already; pass the plain model it was made of")
    sharded = [name for name, tensor in _tensors(model).items() if isinstance(tensor, DTensor)]
    if sharded:
        raise AutoparError(f"tensors of the model are DTensors, sharded already: {_some(sharded)}; pass the model as "
                           "it was before")


def check_material(model: nn.Module) -> None:
    """Raises AutoparError unless all tensors of `model` have values."""
    empty = [name for name, tensor in _tensors(model).items() if tensor.is_meta]
    if empty:
        raise AutoparError(f"tensors of the model are on meta, without values: {_some(empty)}; build it on a real "
                           "device, or only plan it, with autopar.plan")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def _some(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
