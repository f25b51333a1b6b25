"""What a model has to be before anything is made of it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

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
    waiting = [name for name, tensor in held_by(model).items() if is_lazy(tensor)]
    if waiting:
        raise AutoparError(f"tensors of the model have no shape yet: {some(waiting)}; call it once on a batch, then "
                           "compile it")
    complex_ones = [name for name, parameter in model.named_parameters() if parameter.is_complex()]
    if complex_ones:
        raise AutoparError(f"parameters are complex: {some(complex_ones)}, of which ranks can't sum gradients; hold "
                           "real ones, with a last dim of 2, and use torch.view_as_complex of them")
    _check_hooks(model)
    sharded = [name for name, tensor in held_by(model).items() if isinstance(tensor, DTensor)]
    if sharded:
        raise AutoparError(f"tensors of the model are DTensors, sharded already: {some(sharded)}; pass the model as "
                           "it was before")


def _check_hooks(model: nn.Module) -> None:
    """Raises AutoparError for what is called in a backward of the plain model: nothing of it is in a trace."""
    hooked = [name for name, p in model.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]
    modules = [name or "the model" for name, module in model.named_modules()
               if module._backward_hooks or module._backward_pre_hooks]
    if hooked:
        raise AutoparError(f"parameters have hooks for their gradients: {some(hooked)}; register them on the "
                           "parameters() of what autopar.compile returns, where gradients are DTensors")
    if modules:
        raise AutoparError(f"modules have backward hooks, which are not traced: {some(modules)}; remove them, and "
                           "look at gradients by hooks of the compiled model's parameters")
