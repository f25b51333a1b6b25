"""Parameters that travel together: one module a segment and a set of gathered axes, sharded by FSDP2."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from autopar.codegen.parameters import Stored, submesh
from autopar.core.mesh import Mesh


def mangled(name: str) -> str:
    """A parameter's name as an attribute; torch forbids dots there."""
    return name.replace(".", "/")


class ParameterGroup(nn.Module):
    """Holds parameters as they rest."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = tuple(parameters)
        for name, parameter in parameters.items():
            self.register_parameter(mangled(name), parameter)

    def parameter(self, name: str) -> Tensor:
        """The parameter called `name`."""
        found: Tensor = getattr(self, mangled(name))
        return found


def wrap(group: nn.Module, stored: dict[str, Stored], mesh: Mesh, torch_mesh: DeviceMesh) -> None:
    """Let FSDP2 shard what `group` holds over the axes that its parameters are gathered over.

    The modules are never called: `travel.Unit` brings their parameters to use.
    """
    part = submesh(torch_mesh, next(iter(stored.values())).storage.gathered)
    flat = part if part.ndim == 1 else part._flatten("flat")
    places = {id(p): stored[n.replace("/", ".")] for n, p in group.named_parameters()}

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(places[id(parameter)].gather_dim(mesh))

    fully_shard(group, mesh=flat, shard_placement_fn=placement)
