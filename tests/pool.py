"""Worker processes that stay up, so that a test of several ranks costs milliseconds and not a launch.

    def double(rank: int, world_size: int, x: int) -> int: ...
    pool.run(double, 21)        # the results by rank

Functions are pickled by reference, so they live at the top of a module.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LAUNCH_SECONDS = 120.0
GRACE_SECONDS = 1.0
"""How long the other ranks may still take once one has failed: they usually wait for it in a collective."""
OUTPUT_CHARACTERS = 8000


class WorkerFailure(AssertionError):
    """A rank raised, died or did not answer; the message says which, why, and what it printed last."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One rank's process, this side of its pipe and the file that holds what it prints."""

    process: BaseProcess
    connection: Connection
    output: Path

    def obituary(self, answer: str | None, seconds: float) -> str:
        """Why this rank did not deliver, and its last output; `answer` is its traceback if it sent one."""
        code = self.process.exitcode
        silent = f"no answer within {seconds:g} s" if code is None else f"died with exit code {code}"
        output = self.output.read_text(errors="replace") if self.output.exists() else ""
        return f"{answer or silent}\nlast output: {output[-OUTPUT_CHARACTERS:].strip() or 'none'}"


class Pool:
    """`world_size` processes joined by gloo, launched at the first run and again after a failure."""

    def __init__(self, world_size: int, timeout: float = 150.0) -> None:
        """`timeout`: seconds that one run may take."""
        self.world_size, self.timeout = world_size, timeout
        self._workers: list[Worker] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of `function(rank, world_size, *args)` by rank. Raises WorkerFailure if any rank fails."""
        message = pickle.dumps((function, args))
        if not self._workers:
            self._launch()
        for worker in self._workers:
            with contextlib.suppress(OSError):  # it died since the last run: reading its answer will tell
                worker.connection.send_bytes(message)
        return self._results(self.timeout)

    def close(self) -> None:
        """End the processes, working or not."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()

    def _launch(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pool-")
        context = multiprocessing.get_context("forkserver")  # which imports once for all workers
        context.set_forkserver_preload(["tests.imports"])
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            args = (rank, self.world_size, self._folder.name, self.timeout, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._workers.append(Worker(process, ours, _output(self._folder.name, rank)))
        self._results(LAUNCH_SECONDS)

    def _results(self, seconds: float) -> list[Any]:
        """What each rank sends within `seconds`; on any failure the pool is closed, as ranks may be out of step."""
        answers = self._answers(seconds)
        if all(answer is not None and answer[0] for answer in answers):
            return [answer[1] for answer in answers if answer is not None]
        failed = [f"rank {rank} of {self.world_size}: {worker.obituary(answer[1] if answer else None, seconds)}"
                  for rank, (worker, answer) in enumerate(zip(self._workers, answers, strict=True))
                  if answer is None or not answer[0]]
        self.close()
        raise WorkerFailure("\n\n".join(failed))

    def _answers(self, seconds: float) -> list[tuple[bool, Any] | None]:
        """By rank (succeeded, result or traceback), None where none came."""
        pending = {worker.connection: rank for rank, worker in enumerate(self._workers)}
        answers: list[tuple[bool, Any] | None] = [None] * self.world_size
        deadline = time.monotonic() + seconds
        while pending and (ready := wait(list(pending), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                answers[rank] = _read(connection)
                if answers[rank] is None:
                    self._workers[rank].process.join(GRACE_SECONDS)  # for its exit code
                if not (answers[rank] or (False,))[0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers


def _read(connection: Connection) -> tuple[bool, Any] | None:
    try:
        answer: tuple[bool, Any] = pickle.loads(connection.recv_bytes())
    except (EOFError, OSError):
        return None
    return answer


def _output(folder: str, rank: int) -> Path:
    return Path(folder) / f"output{rank}"


def _serve(rank: int, world_size: int, folder: str, timeout: float, connection: Connection) -> None:
    """What a worker does: join the others, then answer calls until the pipe closes."""
    descriptor = os.open(_output(folder, rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable(descriptor)  # a process that is ended by a signal says where it was
    connection.send_bytes(_answer(partial(_join, rank, world_size, folder, timeout)))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            os._exit(0)  # without waiting for gloo's threads
        connection.send_bytes(_answer(partial(_call, message, rank, world_size)))


def _join(rank: int, world_size: int, folder: str, timeout: float) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's own name need not resolve
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size,
                            timeout=timedelta(seconds=timeout))


def _call(message: bytes, rank: int, world_size: int) -> Any:
    function, args = pickle.loads(message)
    return function(rank, world_size, *args)


def _answer(call: Callable[[], Any]) -> bytes:
    """The pickled outcome of `call`, whatever it raises: pytest's failures are no Exceptions."""
    try:
        return pickle.dumps((True, call()))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))
    finally:
        sys.stdout.flush()
