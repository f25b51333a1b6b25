"""Backwards of whole forwards on two ranks: in any number and order, and refused where they would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.core.errors import AutoparError
from tests import builders
from tests.pool import Pool

pytestmark = pytest.mark.dist
Loop = Callable[[nn.Module, Callable[[], Tensor]], None]


def interleaved(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    first, second = loss(), loss()
    first.backward()
    (3.0 * second).backward()


def both_at_once(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    (loss() + loss() ** 2).backward()


def twice_over(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    made = loss()
    made.backward(retain_graph=True)
    made.backward()


def looked_at_between(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    made = loss()
    with torch.no_grad():
        loss()
    made.backward()


LOOPS: dict[str, Loop] = {loop.__name__: loop for loop in (interleaved, both_at_once, twice_over, looked_at_between)}


def case_of(name: str) -> builders.Case:
    return builders.CASES[name]()


def gradients(rank: int, world: int, loop: str, mode: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the parallel model and of the plain one."""
    case, plain = case_of("gpt2"), case_of("gpt2")
    model = autopar.compile(case.model, builders.quick(world), inputs=case.inputs, loss_fn=case.loss_fn,
                            precision="fp32", mode=mode)
    LOOPS[loop](model, lambda: case.call(model))
    LOOPS[loop](plain.model, lambda: plain.plain_loss(plain.model))
    found = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}
    return found, {n: p.grad for n, p in plain.model.named_parameters()}  # type: ignore[return-value,misc]


@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("loop", LOOPS)
def test_gradients_are_the_plain_models(pool: Callable[[int], Pool], loop: str, mode: str) -> None:
    for found, wanted in pool(2).run(gradients, loop, mode):
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name].reshape(grad.shape), grad, rtol=1e-4, atol=1e-6)


def stepped_too_early(rank: int, world: int) -> str:
    case = case_of("gpt2")
    model: Any = autopar.compile(case.model, builders.quick(world), inputs=case.inputs, loss_fn=case.loss_fn,
                                 precision="fp32", mode="zero3")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    case.call(model).backward()
    made = case.call(model)
    optimizer.step()
    with pytest.raises(AutoparError) as refusal:
        made.backward()
    return str(refusal.value)


def test_parameters_that_changed_since_the_forward_are_refused(pool: Callable[[int], Pool]) -> None:
    for said in pool(2).run(stepped_too_early):
        assert "was changed between a forward and its backward" in said and "optimizer's step" in said
