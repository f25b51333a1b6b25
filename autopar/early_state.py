"""State that optimizers made before anything was known of the plan: laid out anew, as their parameters are."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autopar.codegen.parameters import own_part
from autopar.core.errors import AutoparError

_MODELS: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_SEEN: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that have made a step since the last model came."""


def follow(model: nn.Module) -> None:
    """Before an optimizer's next step, let what state it holds of `model`'s parameters lie as they do by now.

    Adagrad makes its sums at once, whole on every rank, where others wait for the first gradients.
    """
    _hook()
    _MODELS.add(model)
    _SEEN.clear()


@functools.cache
def _hook() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer not in _SEEN:
        _SEEN.add(optimizer)
        own = {id(parameter) for model in _MODELS for parameter in model.parameters()}
        for parameter, state in optimizer.state.items():
            if id(parameter) in own:
                state.update({key: _laid(value, parameter) for key, value in state.items()})


def _laid(value: Any, parameter: Tensor) -> Any:
    """`value` laid out as `parameter`, if it is a tensor that lies otherwise."""
    assert isinstance(parameter, DTensor)
    if not isinstance(value, DTensor) or value.shape.numel() != parameter.shape.numel():
        return value
    if (value.device_mesh, value.placements, value.shape) == (parameter.device_mesh, parameter.placements,
                                                              parameter.shape):
        return value
    if value.is_meta:
        raise AutoparError("the optimizer was made, and made its state, before the model had values; give inputs= to "
                           "autopar.compile, or make the optimizer after the first call")
    part = own_part(value.to_local().reshape(parameter.shape), parameter).clone()
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, run_check=False,
                              shape=parameter.shape, stride=parameter.stride())
