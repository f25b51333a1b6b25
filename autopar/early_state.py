"""State that optimizers made before anything was known of the plan: laid out anew, as their parameters are.

Adagrad makes its sums at once, whole on every rank, where others wait for the first gradients.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autopar.codegen.parameters import own_part
from autopar.core.errors import AutoparError


def lay(optimizer: Optimizer, own: Container[int]) -> None:
    """Let the state of the parameters whose identities are in `own` lie as these do by now. Raises AutoparError."""
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
