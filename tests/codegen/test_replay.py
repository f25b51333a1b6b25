"""Recorded steps train as the plain model does, on as many GPUs as there are; on CPUs recordings are acted out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import autopar
from autopar.codegen import replay
from autopar.codegen.engine import Engine, Seeds
from autopar.codegen.executable import Values
from autopar.codegen.replay import Recording, Replays
from autopar.codegen.tape import Pass
from tests.builders import quick
from tests.codegen.replaying import compared
from tests.paths import PYTHONPATH, ROOT
from tests.pool import Pool

MODES = {1: ("gpt2:ddp", "gpt2:zero3", "gpt2:1d"), 2: ("gpt2:ddp", "gpt2:zero3", "dropout:ddp", "resnet:ddp"),
         4: ("gpt2:ddp", "gpt2:zero3", "gpt2:1d", "gpt2:2d")}
BETWEEN = "a parameter was changed between a forward and its backward"


def check(row: dict[str, Any]) -> None:
    assert row["recorded"] == 1, row
    assert row["losses"] < 1e-4 and row["moved"] < 2e-4, row
    changed, twice = row["refused"]
    assert BETWEEN in changed, row
    assert ("compiler=" in twice) is (row["name"] == "resnet"), row


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", MODES)
def test_recorded_steps_train_as_the_plain_model(ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{torch.cuda.device_count()} GPUs, needed are {ranks}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
               "tests.codegen.replaying", *MODES[ranks]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
                          env=os.environ | {"PYTHONPATH": PYTHONPATH})
    assert done.returncode == 0, done.stderr[-3000:]
    for row in json.loads(done.stdout.splitlines()[-1]):
        check(row)


@dataclass
class Acted:
    """What stands for a graph: it does again what was done, where a graph would be launched."""

    act: Callable[[], None]

    def replay(self) -> None:
        self.act()

    def reset(self) -> None:
        """There is nothing to let go."""


def acted(engine: Engine, given: Values, seeds: Seeds) -> Recording:
    """As `replay.record`: what it makes lies in memory that the next replay writes over."""
    program = engine.executable.decision.context.segmented.factored.program
    static = {node: x.clone() if node in program.placeholders("input") else x for node, x in given.items()}
    block = torch.zeros(2 * len(seeds), dtype=torch.int64)
    kept = {name: x.clone() for name, x in given.items() if x.dtype.is_floating_point}
    first = Pass(engine, given, seeds)
    outputs = {node: x.detach() for node, x in first.forward().items()}
    grads = {node: torch.ones_like(x) for node, x in outputs.items() if x.dtype.is_floating_point}
    found = first.backward(grads, keep=False)
    for node, value in kept.items():
        given[node].copy_(value)  # nothing of a recording runs
    going: list[Pass] = []

    def forward() -> None:
        going[:] = [Pass(engine, static, tuple((seed,) for seed in block[::2].unbind()))]
        for node, x in going[0].forward().items():
            outputs[node].copy_(x.detach())

    def backward() -> None:
        for name, x in going.pop().backward(grads, keep=False).items():
            found[name].copy_(x)
    read = {node: static[node] for node in program.placeholders("input") if node in static}
    return Recording(engine, read, block, outputs, grads, found, Acted(forward), Acted(backward),  # type: ignore[arg-type]
                     replay.places_of(engine))


def acted_out(rank: int, world_size: int, name: str, mode: str) -> dict[str, Any]:
    plain = autopar.codegen.runtime.ParallelModule.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "record", acted)
        patch.setattr(replay, "obstacle", lambda engine, engines: "")

        def made(self: Any, *args: Any, **kwargs: Any) -> None:
            plain(self, *args, **kwargs)
            self._replays = Replays()
        patch.setattr("autopar.codegen.runtime.ParallelModule.__init__", made)
        return compared(name, mode, torch.device("cpu"), cluster=quick(world_size))


@pytest.mark.dist
@pytest.mark.parametrize(("name", "mode"), [("gpt2", "zero3"), ("dropout", "1d"), ("resnet", "ddp")])
def test_what_is_replayed_is_a_step(pool: Callable[[int], Pool], name: str, mode: str) -> None:
    check(pool(2).run(acted_out, name, mode)[0])
