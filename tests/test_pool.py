"""The pool of workers: answers by rank, and what is said when a rank fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.pool import Pool, WorkerFailure

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def fragile() -> Iterator[Pool]:
    """A pool of its own, as these tests kill it."""
    pool = Pool(2, timeout=5.0)
    yield pool
    pool.close()


def total(rank: int, world_size: int, x: Tensor) -> tuple[int, int, Tensor]:
    mine = x * (rank + 1)
    dist.all_reduce(mine)
    return rank, world_size, mine


def only_rank_one(act: str) -> Callable[[], object]:
    return {"raise": lambda: 1 / 0, "exit": lambda: os._exit(7), "sleep": lambda: time.sleep(60)}[act]


def misbehave(rank: int, world_size: int, act: str) -> None:
    """Rank 1 does `act`, rank 0 waits for it in a collective."""
    print(f"rank {rank} is about to {act}", flush=True)
    if rank == 1:
        only_rank_one(act)()
    dist.barrier()


def test_answers_come_by_rank(pool: Callable[[int], Pool]) -> None:
    answers = pool(2).run(total, torch.ones(3))
    assert [answer[:2] for answer in answers] == [(0, 2), (1, 2)]
    assert all(torch.equal(answer[2], torch.full((3,), 3.0)) for answer in answers)


@pytest.mark.parametrize("act, said", [("raise", "ZeroDivisionError"), ("exit", "died with exit code 7"),
                                       ("sleep", "no answer within 5 s")])
def test_failures_name_the_rank_and_its_output(fragile: Pool, act: str, said: str) -> None:
    with pytest.raises(WorkerFailure) as failure:
        fragile.run(misbehave, act)
    rank_one = str(failure.value).partition("rank 1 of 2: ")[2]
    assert said in rank_one
    assert f"rank 1 is about to {act}" in rank_one
    assert [answer[0] for answer in fragile.run(total, torch.ones(1))] == [0, 1]
