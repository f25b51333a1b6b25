"""A script that trains until one of the ranks is lost: `losing.py RANK SIZE PORT HOW MODE`, RANK -1 for all."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

import autopar
from tests.builders import gpt2, quick


def lose(how: str) -> None:
    """Leave the others in one of the ways in which ranks are lost."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "error":
        raise ValueError("bad sample")


def main(rank: int, size: int, port: int, how: str, mode: str) -> None:
    autopar.init(rank, size, "127.0.0.1", port, "gloo")
    case = gpt2()
    model = autopar.compile(case.model, quick(size), inputs=case.inputs, mode=mode, precision="fp32",
                            mesh=(2, 2) if size == 4 else None)
    for step in range(4 if how == "nothing" else 1000):
        loss = case.call(model)
        if rank == size - 1 and step == 3:
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
