"""All ranks while they measure: they meet before each try and tell each other what it took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar import launch
from autopar.core.errors import AutoparError, RankLost
from autopar.measure.effort import EFFORTS, FEWEST_SIZES, Effort

PATIENCE = timedelta(seconds=40)
"""How long a rank waits for another: one that is lost ends all of them after it."""
MOST_CALLS = 1000


@dataclass(frozen=True, slots=True)
class Trial:
    """A call that moves `nbytes` and takes about `once_s` seconds; `calls` of it make a batch."""

    nbytes: int
    call: Callable[[], object]
    once_s: float
    calls: int


@dataclass(frozen=True, slots=True)
class Crew:
    """The ranks of `group`, which are all; this one has number `rank` and computes on `device`."""

    group: dist.ProcessGroup
    rank: int
    size: int
    device: torch.device
    effort: Effort

    def told(self, figures: Sequence[float]) -> list[list[float]]:
        """The figures of every rank, as many of each. No rank returns before all have come."""
        mine = torch.tensor(figures, dtype=torch.float64, device=self.device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self.group)
        return [found.tolist() for found in every]

    def objects(self, value: Any) -> list[Any]:
        """The values of every rank."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self.group)
        return every

    def meet(self) -> None:
        """Wait for all ranks, and for what their devices are doing."""
        self.finish()
        self.told([0.0])

    def finish(self) -> None:
        """Wait for what this rank's device is doing."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def noise(self, nbytes: int) -> Tensor:
        """`nbytes` of random fp32, at least one element a rank."""
        return torch.rand(max(self.size, nbytes // 4), device=self.device)

    def points(self, sizes: Sequence[int], call_of: Callable[[int], Callable[[], object]]) -> list[tuple[int, float]]:
        """Bytes and seconds of the calls of ascending sizes, up to where a call would last too long. Collective.

        Seconds are those of the rank that takes longest, all ranks at once: the median over batches of calls, which go
        through all sizes one after another so that what disturbs them for a while disturbs few of each.
        """
        trials: list[Trial] = []
        for nbytes in sizes:
            if len(trials) >= FEWEST_SIZES and trials[-1].once_s * nbytes / trials[-1].nbytes > self.effort.longest_s:
                break
            trials.append(self._trial(nbytes, call_of(nbytes)))
        mine = [self._together(trial) for _ in range(self.effort.repeats) for trial in trials]
        slowest = [max(each) for each in zip(*self.told(mine), strict=True)]
        return [(trial.nbytes, statistics.median(slowest[i::len(trials)])) for i, trial in enumerate(trials)]

    def _trial(self, nbytes: int, call: Callable[[], object]) -> Trial:
        """The first calls, which open connections and fill caches, and one that tells how many make a batch."""
        self._batch(call, 1)
        once = min(max(found for found, in self.told([self._batch(call, 1)])) for _ in range(2))
        return Trial(nbytes, call, once, max(1, min(MOST_CALLS, round(self.effort.batch_s / once))))

    def _together(self, trial: Trial) -> float:
        """Seconds a call on this rank of a batch that all ranks begin together."""
        self.meet()
        return self._batch(trial.call, trial.calls) / trial.calls

    def _batch(self, call: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self.finish()
        return time.perf_counter() - start


@contextmanager
def assembled() -> Iterator[Crew]:
    """All ranks of the default process group. Raises RankLost when one stops answering.

    Collective. Raises AutoparError with fewer than two ranks.
    """
    size = dist.get_world_size()
    if size < 2:
        raise AutoparError("measuring links needs at least 2 ranks, 1 is running; start as many as there are devices, "
                           "by torchrun --nproc-per-node N, srun or mpirun")
    try:
        group = dist.new_group(list(range(size)), timeout=PATIENCE)
        assert group is not None
        crew = Crew(group, dist.get_rank(), size, launch.device(), EFFORTS[dist.get_backend()])
        yield crew
        crew.meet()  # a rank that leaves cuts off those that are still on their way in
        dist.destroy_process_group(group)
    except torch.OutOfMemoryError as error:
        raise RankLost(f"rank {dist.get_rank()} has too little free device memory to measure with: "
                       f"{_first_line(error)}; end what else uses the device") from error
    except (RuntimeError, ValueError) as error:
        raise RankLost(f"rank {dist.get_rank()} can't go on measuring, most likely as another rank is lost "
                       f"({type(error).__name__}: {_first_line(error)}); nothing is written; see what the other ranks "
                       "say, then measure again") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
