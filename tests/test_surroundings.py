"""What training scripts put around a compiled model: heeded as by the plain one, or refused with what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.codegen import surroundings
from tests.builders import Case, mlp, quick

pytestmark = pytest.mark.dist
REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "another dtype": (lambda m: m.to(torch.bfloat16), "is to be one of torch.bfloat16 on cpu; give precision="),
    "half": (lambda m: m.half(), "torch.float16"), "another device": (lambda m: m.to("meta"), "on meta"),
    "a GPU that is not there": (lambda m: m.cuda(), "torch.cuda finds none"),
    "parallel twice": (nn.parallel.DistributedDataParallel, "parallel already; use it as it is"),
}


def compiled(world_size: int, ahead: bool = True) -> tuple[Case, nn.Module]:
    case = mlp()
    return case, autopar.compile(case.model, quick(world_size), inputs=case.inputs if ahead else None, mode="zero3",
                                 loss_fn=case.loss_fn, precision="fp32")


def refusals(rank: int, world_size: int) -> dict[str, str]:
    found = {}
    for ahead in (True, False):
        _, model = compiled(world_size, ahead)
        assert model.to("cpu") is model and model.float() is model
        for name, (act, _) in REFUSED.items():
            with pytest.raises(autopar.AutoparError) as refusal:
                act(model)
            found[name] = str(refusal.value)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_what_can_not_be_done_to_a_compiled_model(pool: Any) -> None:
    for found in pool(2).run(refusals):
        assert [name for name, (_, said) in REFUSED.items() if said not in found[name]] == [], found


def inferred(rank: int, world_size: int, ahead: bool) -> list[float]:
    """Losses under inference mode, and of training afterwards."""
    case, model = compiled(world_size, ahead)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        model.eval()
        with torch.inference_mode():
            found.append(float(case.call(model)))
        model.train()
        loss = case.call(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("ahead", [True, False])
def test_inference_mode_between_steps(pool: Any, ahead: bool) -> None:
    for found in pool(2).run(inferred, ahead):
        assert found[::2] == pytest.approx(found[1::2]) and found[1] > found[3] > found[5]


def cast(rank: int, world_size: int) -> tuple[float, float, list[str]]:
    """The loss with autocast around the model, without it, and what was said of it."""
    case, model = compiled(world_size)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    surroundings.log.addHandler(handler)
    with torch.autocast("cpu", torch.bfloat16):
        within, _ = (float(case.call(model).detach()) for _ in range(2))
    surroundings.log.removeHandler(handler)
    return within, float(case.call(model).detach()), said


def test_autocast_around_a_model_is_told_once(pool: Any) -> None:
    first, *others = pool(2).run(cast)
    assert first[2] == ["autocast is on around a model that computes in fp32, as it was compiled; leave autocast out"]
    assert all(within == without for within, without, _ in (first, *others))


def again(rank: int, world_size: int) -> str:
    case, model = compiled(world_size)
    loss = case.call(model)
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(autopar.AutoparError) as refusal:
        loss.backward()
    return str(refusal.value)


def test_a_backward_too_many_is_refused(pool: Any) -> None:
    assert all("retain_graph=True" in said for said in pool(2).run(again))
