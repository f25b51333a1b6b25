"""Where parameters and buffers get their first values from: a function from a plain name to a whole tensor.

It is called for one name after the other, in the same order on all ranks, so it may communicate; what it returns is
let go of before the next call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.codegen.control import all_there

Values = Callable[[str], Tensor]
"""The whole tensor of a name, in the plain shape, on any device and in any dtype."""


def as_on_rank_zero(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor with rank 0's values, so that ranks which drew different ones start alike; collective."""
    return as_on(0, tensor, device)


def as_on(rank: int, tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor with the values of `rank`; collective."""
    found = tensor.detach().to(device).contiguous()
    if dist.get_world_size() > 1:
        with all_there():
            dist.broadcast(found, rank)
    return found


def seed_of_rank_zero(device: torch.device) -> int:
    """A seed for random ops, the same on every rank; collective."""
    return int(as_on_rank_zero(torch.tensor(torch.initial_seed() % 2**31), device))


def held_by(plain: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return dict(itertools.chain(plain.named_parameters(), plain.named_buffers()))


def state_names(plain: nn.Module) -> dict[str, str]:
    """The names in the plain model's state dict, each with the first name of the same tensor."""
    first = {id(tensor): name for name, tensor in held_by(plain).items()}
    state = plain.state_dict(keep_vars=True)
    return {name: first[id(tensor)] for name, tensor in state.items() if id(tensor) in first}


def own_values(plain: nn.Module, device: torch.device) -> Values:
    """What the parameters and buffers of `plain` hold on rank 0."""
    held = held_by(plain)
    return lambda name: as_on_rank_zero(held[name], device)
