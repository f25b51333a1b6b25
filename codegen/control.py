"""What ranks tell each other in small numbers on the CPU, beside the collectives of the program.

Under NCCL the group is one of gloo's: no rank waits for its GPU to talk, and one that is gone is noticed at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from autopar.codegen.kept import once

_alarms: list[Callable[[], None]] = []


def control() -> dist.ProcessGroup:
    """The group for small talk; collective when it is made, at the first use."""
    return once("control", _opened)


def _opened() -> dist.ProcessGroup:
    world = dist.group.WORLD
    found = world if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    assert found is not None
    return found


def exchanged(numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every rank's `numbers`, as many on each, by rank; collective."""
    if dist.get_world_size() == 1:
        return [numbers]
    mine = torch.tensor(numbers, dtype=torch.int64)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine, group=control())
    return [tuple(each.tolist()) for each in found]


def all_equal(number: int) -> bool:
    """Whether all ranks have the same number; collective."""
    return len(set(exchanged((number,)))) == 1


def on_alarm(tell: Callable[[], None]) -> None:
    """Have `tell` called when this rank fails where others wait for it."""
    _alarms[:] = [tell]


def alarm() -> None:
    """Tell the other ranks that this one failed in the middle of what they do together, so that all end."""
    for tell in _alarms:
        tell()
