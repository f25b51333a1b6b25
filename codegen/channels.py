"""Ways between stages: for each cut and direction a process group of two ranks, on which messages keep their order.

Activations and gradients never share a way, so that neither waits for the other and nothing has to be paired: a stage
starts to receive what it needs next before it computes, and sends what it made while it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.codegen.stages import Port
from autopar.core.errors import RankLost

Links = dict[tuple[int, str], "Link"]
"""This rank's ways, by cut (cut v is behind stage v) and phase."""


@dataclass(frozen=True, slots=True)
class Link:
    """This rank's way over one cut in one phase, and the rank at its other end."""

    group: dist.ProcessGroup
    peer: int


def connect_cuts(columns: Sequence[Sequence[int]], stages: int) -> Links:
    """This rank's links; `columns` are the ranks, by device of the pipeline, that hand values on to each other.

    Collective over the world.
    """
    found: Links = {}
    for column in columns:
        for cut in range(stages - 1):
            ends = column[cut % len(column)], column[(cut + 1) % len(column)]
            for phase in ("forward", "backward"):
                group = dist.new_group(sorted(set(ends)))
                if dist.get_rank() in ends and len(set(ends)) == 2:
                    peer = ends[1] if dist.get_rank() == ends[0] else ends[0]
                    found[cut, phase] = Link(group, peer)
    return found


@contextmanager
def _there(peer: int) -> Iterator[None]:
    """Raises RankLost where what is done fails as `peer` is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"rank {peer}, which runs a stage beside that of rank {dist.get_rank()}, is gone in the middle "
                       f"of a step ({str(error).splitlines()[0]}); see what it said last, and start all ranks again "
                       "from the last checkpoint") from error


@dataclass(eq=False)
class Message:
    """Tensors on their way to or from rank `peer`; `wait` makes the device, or without one this process, wait."""

    tensors: list[Tensor]
    works: list[dist.Work]
    peer: int = -1

    def wait(self) -> list[Tensor]:
        """The tensors once they have come, or left. Raises RankLost where the other rank is gone."""
        with _there(self.peer):
            for work in self.works:
                work.wait()
        return self.tensors

    @property
    def done(self) -> bool:
        """Whether all have left."""
        return all(work.is_completed() for work in self.works)


@dataclass(eq=False)
class Post:
    """Sends and receives over this rank's links; holds on to what is being sent."""

    links: Links
    device: torch.device
    leaving: list[Message] = field(default_factory=list)

    def send(self, cut: int, phase: str, tensors: Sequence[Tensor]) -> None:
        """Start to send."""
        self.leaving = [message for message in self.leaving if not message.done]
        self.leaving.append(self._start(dist.isend, cut, phase, [t.contiguous() for t in tensors]))

    def receive(self, cut: int, phase: str, ports: Sequence[Port]) -> Message:
        """Start to receive what goes through `ports`."""
        return self._start(dist.irecv, cut, phase, [torch.empty(p.shape, dtype=p.dtype, device=self.device)
                                                    for p in ports])

    def finish(self) -> None:
        """Wait until everything has left."""
        for message in self.leaving:
            message.wait()
        self.leaving = []

    def _start(self, act: Callable[..., dist.Work | None], cut: int, phase: str, tensors: list[Tensor]) -> Message:
        if not tensors:
            return Message([], [])
        link = self.links[cut, phase]
        parcel = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in tensors]
        with _there(link.peer):
            works = dist.batch_isend_irecv([dist.P2POp(act, t, link.peer, link.group) for t in parcel])
        return Message(tensors, works, link.peer)
