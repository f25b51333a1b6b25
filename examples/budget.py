"""How long a run may take, how Ctrl-C ends it, and how a script starts and ends on every rank."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

import autopar

MARKS = 5
"""How many times in a run it is validated and saved."""
IMPATIENCE_SECONDS = 2.0
"""Ctrl-C once more after this long ends the process at once; earlier, it is a launcher passing the first one on."""
INTERRUPTED = 128 + signal.SIGINT
BLAME_SECONDS = 2.0
"""Until the ranks that are left end, too, so that the launcher names the one that was first."""
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with the options all examples have; help and complaints come from rank 0 alone."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--steps", type=positive, metavar="N",
                       help="train for N steps, those before a --resume included")
    group.add_argument("--minutes", type=float, default=1.0, metavar="M",
                       help="train for M minutes, those before a --resume included (default: %(default)s)")
    parser.add_argument("--mode", default="auto", help="auto, ddp, zero3, 1d (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--save", metavar="FOLDER", help="write checkpoints there, now and then and at the end")
    parser.add_argument("--resume", metavar="FOLDER", help="go on from the newest checkpoint there")
    parser.add_argument("--plan-out", metavar="FILE", help="write the plan there")
    with Path(os.devnull).open("w") as nowhere, contextlib.ExitStack() as stack:
        if not first_rank():
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        return parser.parse_args()


def positive(text: str) -> int:
    """A number from 1 on, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def first_rank() -> bool:
    """Whether this is rank 0, before there is a process group to ask."""
    return int(os.environ.get("RANK", "0")) == 0


class Budget:
    """How far a run is: the same on every rank, as rank 0 tells it after each step.

    `fraction` goes from 0 to 1, by steps when they are limited and else by time; `stopped` after Ctrl-C.
    """

    def __init__(self, steps: int | None, minutes: float) -> None:
        self.step, self.fraction, self.stopped, self.at_mark = 0, 0.0, False, False
        self._steps, self._limit_s = steps, 60.0 * max(minutes, 1e-6)
        self._start, self._interrupted_at = time.monotonic(), 0.0
        signal.signal(signal.SIGINT, self._interrupt)

    @property
    def seconds(self) -> float:
        """Seconds since the start, those before it was resumed included."""
        return time.monotonic() - self._start

    @property
    def seconds_left(self) -> float:
        """Seconds until the end, at the speed so far."""
        return self.seconds * (1.0 / self.fraction - 1.0) if self.fraction else float("nan")

    @property
    def over(self) -> bool:
        """Whether there is to be no further step."""
        return self.stopped or self.fraction >= 1.0

    def resume(self, step: int, seconds: float) -> None:
        """Go on where another run was."""
        self.step, self._start = step, time.monotonic() - seconds
        self._agree()

    def advance(self) -> None:
        """Count a step; collective."""
        before, self.step = self.fraction, self.step + 1
        self._agree()
        self.at_mark = int(before * MARKS) < int(self.fraction * MARKS) < MARKS

    def _agree(self) -> None:
        fraction = self.step / self._steps if self._steps else self.seconds / self._limit_s
        told = torch.tensor([fraction, self._interrupted_at], dtype=torch.float64, device=autopar.launch.device())
        dist.broadcast(told, 0)
        self.fraction, self.stopped = min(1.0, float(told[0])), bool(told[1])

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Let the step end first: a rank that leaves a collective takes the others down with an error each."""
        if self._interrupted_at and time.monotonic() - self._interrupted_at > IMPATIENCE_SECONDS:
            os._exit(INTERRUPTED)
        self._interrupted_at = self._interrupted_at or time.monotonic()


def start(main: Callable[[], int]) -> None:
    """Run `main` on this rank and exit with its code; 2 for what the user can mend, told in one line by rank 0."""
    try:
        code = main()
    except autopar.AutoparError as error:
        code = 2
        if first_rank():
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST_PEER):
            raise
        code = 1
        print(f"rank {dist.get_rank()}: lost another rank, which has ended; stopping", file=sys.stderr, flush=True)
        time.sleep(BLAME_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # without waiting for ranks that may be gone
    dist.destroy_process_group()
