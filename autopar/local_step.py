"""Optimizers that treat every element alone step on each rank's parts.

The numbers are those of a step on DTensors, in a fifth of the host's time or less, and are there too where DTensors
lack an op, such as fused SGD's or Rprop's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from autopar.codegen import private

ELEMENTWISE = frozenset({ASGD, SGD, Adadelta, Adagrad, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Rprop})
"""Optimizers themselves: a class made from one may look at whole tensors."""
_SAME_EVERYWHERE = frozenset({"step", "eta", "mu", "mu_product"})
"""State that is one number, the same on all ranks, and no DTensor."""
Gradients = list[tuple[Tensor, Tensor]]
"""Parameters, each with its gradient."""


def goes_by_parts(optimizer: Optimizer) -> bool:
    """Whether `optimizer` may step on parts: elementwise, and nobody looks at its parameters around a step."""
    return (type(optimizer) in ELEMENTWISE and not private.is_watched(optimizer)
            and not any(group.get("differentiable") for group in optimizer.param_groups))


@torch.no_grad()
def step_on_parts(optimizer: Optimizer, own: Container[int]) -> Gradients:
    """Step for the parameters whose identities are in `own`; returns them and their gradients, which are taken from
    them so that the optimizer's own step leaves them out."""
    parts: dict[Tensor, DTensor] = {}
    groups = [{**group, "params": [part for p in group["params"] if id(p) in own for part in _parts(p, parts)]}
              for group in optimizer.param_groups]
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__, param_groups=groups, state=defaultdict(dict))
    twin.state.update((part, {key: _local(value) for key, value in optimizer.state[p].items()})
                      for part, p in parts.items() if p in optimizer.state)
    type(twin).step.__wrapped__(twin)  # type: ignore[attr-defined]  # without its hooks, which may see no parts
    for part, p in parts.items():
        held = optimizer.state[p]
        held.update((key, _kept(key, value, held.get(key), p)) for key, value in twin.state[part].items())
    optimizer.__dict__.update((key, value) for key, value in twin.__dict__.items()
                              if key not in ("param_groups", "state"))
    return [_taken(p) for p in parts.values()]


def _parts(parameter: Tensor, parts: dict[Tensor, DTensor]) -> list[Tensor]:
    """This rank's part with its gradient, none where there is no gradient or it lies otherwise."""
    grad = parameter.grad
    if not (isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements == parameter.placements):
        return []
    part = parameter.to_local().detach()
    part.grad = grad.to_local()
    parts[part] = parameter
    return [part]


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _kept(key: str, value: Any, held: Any, parameter: DTensor) -> Any:
    """A value of a part's state as the parameter's: the DTensor that was there where it is still the same memory."""
    if not isinstance(value, Tensor) or key in _SAME_EVERYWHERE or (isinstance(held, DTensor) and (
            held.to_local() is value)):
        return held if isinstance(held, DTensor) and isinstance(value, Tensor) else value
    return private.distributed(value, private.spec_of(parameter))


def _taken(parameter: Tensor) -> tuple[Tensor, Tensor]:
    gradient = parameter.grad
    assert gradient is not None
    parameter.grad = None
    return parameter, gradient
