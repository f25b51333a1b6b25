"""What ranks tell each other in small numbers on the CPU, beside the collectives of the program.

Under NCCL the group is one of gloo's: no rank waits for its GPU to talk, and one that is gone is noticed at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist

from autopar.codegen.kept import once
from autopar.core.errors import RankLost

NEWS_SECONDS = 2.0
"""How long one that can't go on waits to hear which rank it is that is gone."""
SILENT_SECONDS = 40.0
"""How long nothing may be heard of a rank: every process beats many times in it, whatever it computes."""
How = Literal["left", "lost", "silent"]
_alarms: list[Callable[[], None]] = []
_away: dict[int, How] = {}
"""The ranks that are known to be away, the first first: by leave, at once, or still there and silent."""
_heard = threading.Event()
GONE: dict[How, str] = {
    "lost": ("is gone: its process has ended by an error or a signal, it failed in the middle of a step, or its "
             "machine is out of reach"),
    "silent": (f"does not answer: nothing was heard of it for {SILENT_SECONDS:g} s, its process is stopped, or its "
               "machine overloaded or out of reach"),
}
"""What is said of a rank that is away without leave."""


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
    with all_there():
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


def note_away(rank: int, how: How) -> None:
    """Remember that `rank` is away, so that errors name it; who left has ended without an error."""
    _away.setdefault(rank, how)
    _heard.set()


@contextmanager
def all_there() -> Iterator[None]:
    """Raises RankLost, from torch's error, where ranks don't meet in what is done; other errors are left alone."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        if _alarms:  # there is somebody who tells
            _heard.wait(NEWS_SECONDS)
        first = next(iter(str(error).splitlines()), "").split(". ")[0]
        raise RankLost(_who_is_away(first)) from error


def _who_is_away(said: str) -> str:
    """What is known of ranks that are away; `said` is what torch says."""
    lost, left = [rank for rank, how in _away.items() if how in GONE], [*_away]
    if lost:
        return (f"rank {lost[0]} {GONE[_away[lost[0]]]}; see what it said last, and start all ranks again from the "
                f"last checkpoint ({said})")
    if left:
        return (f"the connection to rank {left[0]} was closed: it has ended, while rank {dist.get_rank()} is still in "
                "what all ranks do together; take as many steps on each rank, and make the same calls on all, "
                f"clip_grad_norm_ and model.eval() too ({said})")
    return (f"rank {dist.get_rank()} can't go on: the connection to another rank was closed, which has ended or failed "
            "or is at another call; see what the others said last, and make the same calls on all ranks, "
            f"clip_grad_norm_ too ({said})")
