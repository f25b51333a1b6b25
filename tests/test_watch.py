"""When a rank is lost the others say so and end, within a minute."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from autopar.watch import Pulse, told_away
from tests.paths import PYTHONPATH, ROOT

pytestmark = pytest.mark.dist
START_SECONDS, MOST_SECONDS = 200.0, 60.0


Outcome = tuple[list[int], list[str], float]


def run(size: int, how: str, mode: str, started: tuple[int, ...], backend: str = "gloo") -> Outcome:
    """By process how it ended and what it said; the seconds from the first end to the last. `started` are the ranks,
    each a process, or -1 for one that spawns them all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "GLOO_SOCKET_IFNAME": "lo"}
    command, rest = [sys.executable, "-m", "tests.losing"], [str(size), str(port), how, mode, backend]
    ranks = [subprocess.Popen([*command, str(rank), *rest], env=environment, cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) for rank in started]
    try:
        deadline = time.monotonic() + START_SECONDS
        while all(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
        first = time.monotonic()
        if how == "stop":
            ranks[-1].kill()
        said = [rank.communicate(timeout=max(1.0, first + MOST_SECONDS - time.monotonic()))[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], said, time.monotonic() - first


@pytest.mark.parametrize(("size", "how", "mode"), [
    (2, "kill", "zero3"), pytest.param(4, "kill", "zero+1d", marks=pytest.mark.slow),
    pytest.param(2, "error", "1d", marks=pytest.mark.slow)])
def test_the_others_are_told(size: int, how: str, mode: str) -> None:
    codes, said, seconds = run(size, how, mode, tuple(range(size)))
    assert codes[-1] == (-9 if how == "kill" else 1) and seconds < MOST_SECONDS
    for code, text in zip(codes[:-1], said[:-1], strict=True):
        assert code not in (0, None) and f"rank {size - 1} of {size} is gone" in text, text
        assert size > 2 or f"RankLost: rank {size - 1} is gone" in text, text


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_told_of() -> None:
    _, said, _ = run(4, "stop", "zero+1d", (0, 1, 2, 3))
    assert all("rank 3 of 4 does not answer: nothing was heard of it for 40 s" in text for text in said[:-1]), said


def test_ranks_are_silent_after_a_while_but_not_for_this_one_s_own_stop() -> None:
    pulse = Pulse({1: 0.0, 2: 0.0}, looked=0.0)
    pulse.heard[1] = 15.0
    assert [pulse.silent(now) for now in (10.0, 20.0, 39.0, 41.0, 50.0)] == [[], [], [], [2], [2]]
    assert [pulse.silent(now) for now in (500.0, 510.0, 520.0, 535.0, 541.0)] == [[], [], [], [], [1, 2]]


@pytest.mark.parametrize(("word", "away"), [(-2, (7, "lost")), (3, (3, "lost")), (0, (0, "lost")), (-4, (0, "silent")),
                                            (-7, (3, "silent"))])
def test_words(word: int, away: tuple[int, str]) -> None:
    assert told_away(7, word) == away


@pytest.mark.parametrize(("size", "how"), [
    (3, "kill"), (2, "caught"), pytest.param(2, "kill", marks=pytest.mark.slow),
    pytest.param(3, "error", marks=pytest.mark.slow)])
def test_a_rank_that_is_lost_between_stages_ends_all(size: int, how: str) -> None:
    codes, said, seconds = run(size, how, "pp", tuple(range(size)))
    assert 0 not in codes and codes[-1] == (-9 if how == "kill" else 1) and seconds < MOST_SECONDS, said
    for text in said[:-1]:
        assert f"rank {size - 1} of {size} is gone" in text or f"RankLost: rank {size - 1}" in text, text


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "how"), [(2, "kill"), (4, "kill"), (2, "caught")])
def test_a_rank_that_is_lost_between_stages_ends_all_under_nccl(size: int, how: str) -> None:
    need(size)
    codes, said, seconds = run(size, how, "pp", tuple(range(size)), "nccl")
    assert 0 not in codes and codes[-1] == (-9 if how == "kill" else 1) and seconds < MOST_SECONDS, said
    assert all(f"rank {size - 1} of {size} is gone" in text for text in said[:-1]), said


@pytest.mark.parametrize("started", [(0, 1), pytest.param((-1,), marks=pytest.mark.slow)], ids=["launched", "spawned"])
def test_ranks_that_end_apart_without_an_error_are_left_alone(started: tuple[int, ...]) -> None:
    codes, said, _ = run(2, "nothing", "ddp", started)
    assert codes == [0] * len(started)
    assert "".join(said).count("done") == 2 and all("gone" not in text for text in said), said


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "how", "mode"), [
    (2, "kill", "zero3"), (2, "kill", "ddp"), (4, "kill", "zero+1d"), (2, "error", "1d")])
def test_the_others_are_told_under_nccl(size: int, how: str, mode: str) -> None:
    need(size)
    codes, said, seconds = run(size, how, mode, tuple(range(size)), "nccl")
    assert codes[-1] == (-9 if how == "kill" else 1) and seconds < MOST_SECONDS, said
    for code, text in zip(codes[:-1], said[:-1], strict=True):
        assert code not in (0, None) and f"rank {size - 1} of {size} is gone" in text, text


ELSE = {"model": "rank 0 and", "batch": "ranks brought batches of different kinds"}
"""What all say, by what one rank brings another of."""


@pytest.mark.parametrize(("how", "backend"), [
    ("model", "gloo"), pytest.param("batch", "gloo", marks=pytest.mark.slow),
    pytest.param("model", "nccl", marks=pytest.mark.gpu), pytest.param("batch", "nccl", marks=pytest.mark.gpu)])
def test_a_rank_with_something_else_is_told_of(how: str, backend: str) -> None:
    need(2 if backend == "nccl" else 0)
    codes, said, seconds = run(2, how, "zero3", (0, 1), backend)
    assert codes == [1, 1] and seconds < MOST_SECONDS, said
    assert all("AutoparError" in text and ELSE[how] in text for text in said), said


def need(gpus: int) -> None:
    """Skip where there are fewer."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs, there are {torch.cuda.device_count()}")
