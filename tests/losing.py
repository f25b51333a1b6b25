"""A script that trains until one of the ranks is lost, or brings something else:
`losing.py RANK SIZE PORT HOW MODE BACKEND`, RANK -1 for all."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
from typing import Any

import torch

import autopar
from autopar import launch
from autopar.codegen.channels import Post
from tests.builders import Case, gpt2, quick

LAST_STEP = 1000


def lose_between_stages(how: str) -> None:
    """Leave the others when the second next message is to be sent; where the error is "caught" stay on as if nothing
    was."""
    send, sent = Post.send, itertools.count()

    def lost(*args: Any) -> None:
        if next(sent) == 1:
            lose(how)
        send(*args)

    Post.send = lost  # type: ignore[method-assign]


def lose(how: str) -> None:
    """Leave the others in one of the ways in which ranks are lost."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how in ("error", "caught"):
        raise ValueError("bad sample")


def brought(case: Case, odd: bool) -> dict[str, Any]:
    """The batch of a step, another one where it is odd."""
    assert isinstance(case.inputs, dict)
    here = launch.device()
    return {name: (x[:, 1:] if odd else x).to(here) for name, x in case.inputs.items()}


def through_stages(case: Case, model: Any, how: str) -> None:
    """Train, and be lost in the fourth step."""
    for step in range(LAST_STEP):
        if how and step == 3:
            lose_between_stages(how)
        with contextlib.suppress(ValueError) if how == "caught" else contextlib.nullcontext():
            case.call(model, brought(case, odd=False)).backward()


def main(rank: int, size: int, port: int, how: str, mode: str, backend: str) -> None:
    autopar.init(rank, size, "127.0.0.1", port, backend)
    last = rank == size - 1
    case = gpt2(layers=3 if last and how == "model" else 2)
    # Who is lost is told alike by all compilers: one mode takes that of the device, others the quick one.
    model = autopar.compile(case.model, quick(size) if backend == "gloo" else None, inputs=case.inputs, mode=mode,
                            precision="fp32", compiler=None if mode == "zero3" else "eager",
                            mesh=(2, 2) if size == 4 and mode != "pp" else None,
                            micro_batches=4 if mode == "pp" else None)
    if mode == "pp":
        through_stages(case, model, how if last else "")
    for step in range(4 if how == "nothing" else LAST_STEP):
        loss = case.call(model, brought(case, last and step == 3 and how == "batch"))
        if last and step == 3:
            parameter = next(iter(model.parameters()))
            parameter.register_post_accumulate_grad_hook(lambda _: lose(how))  # in the middle of a backward
        loss.backward()
        model.zero_grad()
    if rank == 0:
        time.sleep(2.0)  # others end before
    print("done", torch.distributed.get_rank())


if __name__ == "__main__":
    rank, size, port = map(int, sys.argv[1:4])
    if rank >= 0:
        main(rank, size, port, *sys.argv[4:])
    else:
        torch.multiprocessing.spawn(main, (size, port, *sys.argv[4:]), size)
