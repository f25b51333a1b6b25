"""What has to be seen to when an optimizer of a compiled model's parameters steps, whatever made the optimizer.

Before a step the state that it made too early is laid out as the plan has it, what can't be right is refused, and those
that treat every element alone step on the parts that each rank holds.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, Muon, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from autopar.codegen.runtime import ParallelModule
from autopar.core.errors import AutoparError
from autopar.core.told import some
from autopar.early_state import lay
from autopar.local_step import Gradients, goes_by_parts, step_on_parts

_MODELS: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_PLAIN: dict[int, weakref.ref[Tensor]] = {}
"""Parameters of plain models that were compiled, by identity."""
_SEEN: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that have made a step since the last model came."""
_TAKEN: weakref.WeakKeyDictionary[Optimizer, Gradients] = weakref.WeakKeyDictionary()
"""Gradients of the parameters that are done, until the optimizer's own step is over."""
_OWN: dict[tuple[int, ...], frozenset[int]] = {}
"""The identities of all models' parameters, by those of the models: one entry."""
Closure = Callable[[], Any]


def follow(model: nn.Module, plain: nn.Module) -> None:
    """See to the steps of `model`'s parameters from now on, and to those of `plain`'s, which it was made of."""
    _hook()
    _MODELS.add(model)
    for key in [key for key, known in _PLAIN.items() if known() is None]:
        del _PLAIN[key]
    _PLAIN.update((id(p), weakref.ref(p)) for p in plain.parameters())
    _SEEN.clear()
    _OWN.clear()


@functools.cache
def _hook() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments to step with, None for the same. Raises AutoparError for what would train nothing, or wrongly."""
    own, closure = _own(), kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        _check_not_plain(optimizer, closure)
        return None
    if closure is not None and goes_by_parts(optimizer):
        with torch.enable_grad():
            loss = closure()  # which these call once, at first
        _see_to(optimizer)
        _TAKEN[optimizer] = step_on_parts(optimizer, own)
        return (args[0], lambda: loss), {}
    if closure is not None:
        return (args[0], functools.partial(_called, closure, optimizer)), {}
    _see_to(optimizer)
    if goes_by_parts(optimizer):
        _TAKEN[optimizer] = step_on_parts(optimizer, own)
    return None


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for parameter, gradient in _TAKEN.pop(optimizer, []):
        parameter.grad = gradient


def _called(closure: Closure, optimizer: Optimizer) -> Any:
    found = closure()
    _see_to(optimizer)
    return found


def _own() -> frozenset[int]:
    models = tuple(map(id, _MODELS))
    if models not in _OWN:
        _OWN.clear()
        _OWN[models] = frozenset(id(p) for model in _MODELS for p in model.parameters())
    return _OWN[models]


def _see_to(optimizer: Optimizer) -> None:
    """What one look is enough for, the first step after a model came."""
    if optimizer in _SEEN:
        return
    if isinstance(optimizer, Adafactor):
        raise AutoparError("torch.optim.Adafactor writes norms of rows, columns and whole parameters in place, which "
                           "parameters that are cut (DTensors) refuse; use an optimizer that treats every element "
                           "alone, such as torch.optim.AdamW, or Muon with keep_shapes=True")
    if isinstance(optimizer, Muon):
        _check_shapes(optimizer)
    lay(optimizer, _own())
    _SEEN.add(optimizer)


def _check_shapes(optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    others = [name for model in _MODELS if isinstance(model, ParallelModule) for name, p in model.named_parameters()
              if id(p) in held and tuple(p.shape) != model.plain_shape(name)]
    if others:
        raise AutoparError(f"{type(optimizer).__name__} looks at rows and columns, and {some(others)} rest in other "
                           "shapes than the model's own; give keep_shapes=True to autopar.compile")


def _check_not_plain(optimizer: Optimizer, closure: Closure | None) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if closure is None and held and all(p.grad is None and id(p) in _PLAIN and _PLAIN[id(p)]() is p for p in held):
        raise AutoparError(f"{type(optimizer).__name__} has the parameters of a plain model that was compiled, and "
                           "none has a gradient; make the optimizer of the parameters() of what autopar.compile "
                           "returned")
