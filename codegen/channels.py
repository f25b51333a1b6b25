"""Ways between stages: for each cut and direction a process group of two ranks, on which messages keep their order.

Activations and gradients never share a way, so that neither waits for the other and nothing has to be paired: a stage
receives what it needs next while it computes, and sends what it made while it goes on.

Under NCCL two things could wait for each other for ever, and are kept apart. A way is opened by its first message, for
which the host of either end waits for the other's: every way is used once, in one order, before steps begin. And a
message that is on its way is a kernel which runs until it has come, for which the host waits wherever it waits for its
device, as it does to load code or to free memory: a receive begins after the host has launched what it has to compute
meanwhile, on a stream that does not wait for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.codegen.kept import once
from autopar.codegen.stages import Port
from autopar.core.errors import RankLost

Links = dict[tuple[int, str], "Link"]
"""This rank's ways, by cut (cut v is behind stage v) and phase."""


@dataclass(frozen=True, slots=True)
class Link:
    """This rank's way over one cut in one phase, and the rank at its other end."""

    group: dist.ProcessGroup
    peer: int


def connect_cuts(columns: Sequence[Sequence[int]], stages: int, device: torch.device) -> Links:
    """This rank's links; `columns` are the ranks, by device of the pipeline, that hand values on to each other, which
    lie on `device`.

    Collective over the world.
    """
    found: Links = {}
    for column in columns:
        for cut in range(stages - 1):
            ends = column[cut % len(column)], column[(cut + 1) % len(column)]
            for phase in ("forward", "backward"):
                mine: list[int] = sorted(set(ends))
                group = once(("way", cut, phase, *mine), partial(_opened, mine, device))
                if dist.get_rank() in ends and len(set(ends)) == 2:
                    peer = ends[1] if dist.get_rank() == ends[0] else ends[0]
                    found[cut, phase] = Link(group, peer)
    return found


def _opened(ends: list[int], device: torch.device) -> dist.ProcessGroup:
    """The group of a way, which the ranks at its ends have used once; their hosts wait for it. Collective."""
    group: dist.ProcessGroup = dist.new_group(ends)
    if dist.get_rank() in ends and len(ends) == 2:
        first = dist.get_rank() == ends[0]
        act, peer = (dist.isend, ends[1]) if first else (dist.irecv, ends[0])
        with _there(peer):
            for work in dist.batch_isend_irecv([dist.P2POp(act, torch.zeros(1, device=device), peer, group)]):
                work.wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return group


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
    """Tensors on their way to or from rank `peer`, or about to be, where there is a `start` that brings them there.

    `wait` makes the device, or without one this process, wait.
    """

    tensors: list[Tensor]
    works: list[dist.Work]
    peer: int = -1
    start: Callable[[], list[dist.Work]] | None = None

    def begin(self) -> None:
        """Start, unless it has been started."""
        if self.start is not None:
            start, self.start = self.start, None
            self.works = start()

    def wait(self) -> list[Tensor]:
        """The tensors once they have come, or left. Raises RankLost where the other rank is gone."""
        self.begin()
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
        leaving = self._message(dist.isend, cut, phase, [t.contiguous() for t in tensors])
        leaving.begin()
        self.leaving.append(leaving)

    def receive(self, cut: int, phase: str, ports: Sequence[Port]) -> Message:
        """What comes through `ports`, to be received once the device has done what it was given until now. On CPUs
        that has been started, on GPUs it is by `begin`."""
        message = self._message(dist.irecv, cut, phase, [torch.empty(p.shape, dtype=p.dtype, device=self.device)
                                                         for p in ports])
        if self.device.type != "cuda":
            message.begin()
        elif message.start is not None:
            message.start = _beside(self._stream, message.start)
        return message

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """From which receives begin."""
        return torch.cuda.Stream(self.device)

    def finish(self) -> None:
        """Wait until everything has left."""
        for message in self.leaving:
            message.wait()
        self.leaving = []

    def _message(self, act: Callable[..., dist.Work | None], cut: int, phase: str, tensors: list[Tensor]) -> Message:
        if not tensors:
            return Message([], [])
        link = self.links[cut, phase]
        parcel = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in tensors]

        def start() -> list[dist.Work]:
            with _there(link.peer):
                return dist.batch_isend_irecv([dist.P2POp(act, t, link.peer, link.group) for t in parcel])
        return Message(tensors, [], link.peer, start)


def _beside(stream: torch.cuda.Stream, start: Callable[[], list[dist.Work]]) -> Callable[[], list[dist.Work]]:
    """`start` from `stream`, after what the current one was given until now and not what it is given later: memory
    that is received into may have been another value's."""
    before = torch.cuda.current_stream().record_event()

    def started() -> list[dist.Work]:
        stream.wait_event(before)
        with torch.cuda.stream(stream):
            return start()
    return started
