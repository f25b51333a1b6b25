"""Ways between stages on devices as GPUs are: a host that waits for its device waits for all that was begun on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import autopar
from autopar import pipelines
from autopar.codegen import pipeline
from autopar.codegen.channels import Message, Post
from autopar.codegen.stages import Port
from autopar.core.schedules import Schedule
from tests.builders import gpt2, quick

pytestmark = pytest.mark.dist
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved", "looped")
TOLERANCE = 1e-5


def as_a_gpu() -> ExitStack:
    """Receives begin when they are told to, and stages compute once all that was begun has come."""
    begun: list[Message] = []
    begin, wait = Message.begin, Message.wait

    def receive(post: Post, cut: int, phase: str, ports: Sequence[Port]) -> Message:
        return post._message(dist.irecv, cut, phase, [torch.empty(p.shape, dtype=p.dtype) for p in ports])

    def noted(message: Message) -> None:
        if message.start is not None:
            begun.append(message)
        begin(message)

    def waited(message: Message) -> list[torch.Tensor]:
        found = wait(message)
        message.works = []
        return found

    def waiting(act: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            for message in begun:
                message.wait()
                message.works = []  # gloo waits once
            begun.clear()
            return act(*given)
        return run

    patches = ExitStack()
    for where, name, what in ((Post, "receive", receive), (Message, "begin", noted),
                              (Message, "wait", waited),
                              (pipeline.Step, "_forward", waiting(pipeline.Step._forward)),
                              (pipeline.Step, "_backward", waiting(pipeline.Step._backward))):
        patches.enter_context(mock.patch.object(where, name, what))
    return patches


def losses_off(rank: int, world_size: int) -> list[float]:
    found = []
    for schedule in SCHEDULES:
        case = gpt2(layers=4)
        expected = float(case.plain_loss(case.model).detach())
        with mock.patch.object(pipelines, "_schedules", lambda *_, s=schedule: [s]):
            model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, precision="fp32",
                                    solver="highs", mode="pp", micro_batches=4)
        with as_a_gpu():
            for _ in range(2):
                loss = case.call(model)
                loss.backward()
        found.append(abs(float(loss.detach()) - expected))
    return found


def test_a_stage_that_waits_for_its_device_waits_for_nothing_that_needs_it(pool: Any) -> None:
    for found in pool(2).run(losses_off):
        assert max(found) < TOLERANCE, found
