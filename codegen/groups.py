"""Parameters that travel together: one module a segment and a set of gathered axes, wrapped by FSDP2."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from autopar.codegen.parameters import Stored, locals_of, submesh
from autopar.core.mesh import Mesh

# A segment may hand on a view (a reshaped result); nothing here ever writes in place to what a module returns.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
Continuation = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


def mangled(name: str) -> str:
    """A parameter's name as an attribute; torch forbids dots there."""
    return name.replace(".", "/")


class ParameterGroup(nn.Module):
    """Holds parameters; its forward hands their local tensors on, so that FSDP2's hooks gather them around it."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = tuple(parameters)
        for name, parameter in parameters.items():
            self.register_parameter(mangled(name), parameter)

    def forward(self, run: Continuation, held: dict[str, Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        """`run` with the parameters held so far and this group's; `inputs` tell FSDP2 when the backward ends."""
        parts = locals_of([self.parameter(name) for name in self.names])
        return run(held | dict(zip(self.names, parts, strict=True)), *inputs)

    def parameter(self, name: str) -> Tensor:
        """The parameter called `name`, gathered while inside `forward`."""
        found: Tensor = getattr(self, mangled(name))
        return found


def wrap(group: nn.Module, stored: dict[str, Stored], mesh: Mesh, torch_mesh: DeviceMesh, dtype: torch.dtype | None,
         ignored: set[nn.Parameter]) -> None:
    """Let FSDP2 shard what `group` holds over the axes that its parameters are gathered over.

    Gradients are summed in fp32, never averaged: losses here are global means already.
    """
    storage = next(iter(stored.values())).storage if stored else None
    axes = storage.gathered if storage else tuple(mesh.axes)
    part = submesh(torch_mesh, axes)
    flat = part if part.ndim == 1 else part._flatten("flat")
    places = {id(p): stored[n.replace("/", ".")] for n, p in group.named_parameters() if n.replace("/", ".") in stored}

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(places[id(parameter)].gather_dim(mesh))

    mixed = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if dtype else MixedPrecisionPolicy()
    again = not storage.kept if storage else None
    fully_shard(group, mesh=flat, reshard_after_forward=again, shard_placement_fn=placement,
                mp_policy=mixed, ignored_params=ignored)
    for module in group.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def nested(groups: tuple[ParameterGroup, ...], run: Continuation, held: dict[str, Tensor],
           inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """`run` inside all `groups`, with the parameters of each."""
    if not groups:
        return run(held, *inputs)
    first, rest = groups[0], groups[1:]

    def inner(gathered: dict[str, Tensor], *passed: Any) -> tuple[Tensor, ...]:
        return nested(rest, run, gathered, passed)

    result: tuple[Tensor, ...] = first(inner, held, *inputs)
    return result
