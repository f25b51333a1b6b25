"""What is opened once for all models of a process: groups of ranks, meshes of them.

Torch keeps a group for as long as the process runs, and with it threads that wake up for messages or memory of the
device, whether the model is still there that it was made for or not. Models take turns, so that they can share.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
_made: dict[Hashable, Any] = {}
_world: list[dist.ProcessGroup] = []
"""The default group that all of them are parts of, none or one."""


def once(key: Hashable, make: Callable[[], T]) -> T:
    """What `make()` made when first asked for `key` under the default process group; collective where that is."""
    world = dist.group.WORLD
    assert world is not None, "no process group"
    if not (_world and _world[0] is world):
        _world[:] = [world]
        _made.clear()
    if key not in _made:
        _made[key] = make()
    found: T = _made[key]
    return found
