"""What a model has to be before anything is made of it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from autopar.codegen.runtime import ParallelModule
from autopar.codegen.values import held_by
from autopar.core.errors import AutoparError
from autopar.core.told import some
from autopar.deferred import DeferredModule
from autopar.passes.blame import check_model

PARALLEL = (ParallelModule, DeferredModule, nn.parallel.DistributedDataParallel)


def check_plain(model: nn.Module, loss_fn: Any) -> None:
    """Raises AutoparError unless `model` is a module as written, and `loss_fn` a function or None."""
    check_model(model, loss_fn)
    if isinstance(model, PARALLEL):
        raise AutoparError(f"model is a {type(model).__name__}, parallel already; pass the plain model it was made of")
    sharded = [name for name, tensor in held_by(model).items() if isinstance(tensor, DTensor)]
    if sharded:
        raise AutoparError(f"tensors of the model are DTensors, sharded already: {some(sharded)}; pass the model as "
                           "it was before")
