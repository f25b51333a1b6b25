"""What training scripts do around a step, on two ranks as on the plain model in one process."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR

import autopar
from tests.builders import CASES, Case, quick
from tests.pool import Pool

pytestmark = pytest.mark.dist
Pools = Callable[[int], Pool]
STEPS = 6
TOLERANCE = 2e-5


class Lion(Optimizer):
    """Signs of an average of gradients, as one writes an optimizer oneself; a rate for each group."""

    def __init__(self, parameters: Iterable[Any], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                first, second = group["betas"]
                parameter.add_(torch.tanh(100 * (average * first + parameter.grad * (1 - first))), alpha=-group["lr"])
                average.lerp_(parameter.grad, 1 - second)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd-momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: Adam(p, lr=3e-3, amsgrad=True),
    "adamw-foreach": lambda p: AdamW(p, lr=3e-3, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=3e-3, fused=True),
    "adamw-loop": lambda p: AdamW(p, lr=3e-3, foreach=False, fused=False),
    "adagrad": lambda p: Adagrad(p, lr=0.01),
    "rmsprop": lambda p: RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "lion": lambda p: Lion(p, lr=1e-3),
}


@dataclass(frozen=True)
class Way:
    """How a model is compiled; at its first call where `ahead` is False."""

    mode: str = "zero3"
    ahead: bool = True
    mesh: tuple[int, ...] = (2,)

    def __str__(self) -> str:
        return f"{self.mode}-{'ahead' if self.ahead else 'lazily'}-on-{'x'.join(map(str, self.mesh))}"

    def compile(self, case: Case, world_size: int) -> Any:
        return autopar.compile(case.model, quick(world_size), inputs=case.inputs if self.ahead else None,
                               loss_fn=case.loss_fn, mode=self.mode, mesh=self.mesh, precision="fp32")


def clip(model: nn.Module, most: float) -> None:
    clipping = getattr(model, "clip_grad_norm_", None)
    if clipping is None:
        nn.utils.clip_grad_norm_(model.parameters(), most)
    else:
        clipping(most)


Loop = Callable[[nn.Module, Callable[[], Tensor]], list[float]]
"""Trains a model, by what its next loss is, and tells of it."""


def with_optimizer(name: str) -> Loop:
    def loop(model: nn.Module, loss_of: Callable[[], Tensor]) -> list[float]:
        return steps(model, loss_of, OPTIMIZERS[name](model.parameters()))
    return loop


def steps(model: nn.Module, loss_of: Callable[[], Tensor], optimizer: Optimizer, schedule: Any = None,
          to_none: bool = True) -> list[float]:
    losses = []
    for _ in range(STEPS):
        loss = loss_of()
        loss.backward()
        clip(model, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        if schedule is not None:
            schedule.step()
        losses.append(float(loss.detach()))
    return losses


def accumulating(model: nn.Module, loss_of: Callable[[], Tensor]) -> list[float]:
    """Two backward passes a step, of losses that are scaled."""
    optimizer, losses = AdamW(model.parameters(), lr=3e-3), []
    for step in range(STEPS):
        loss = loss_of() / 2
        loss.backward()
        if step % 2:
            clip(model, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def kept_gradients(model: nn.Module, loss_of: Callable[[], Tensor]) -> list[float]:
    return steps(model, loss_of, SGD(model.parameters(), lr=0.05, momentum=0.9), to_none=False)


def grouped(model: nn.Module, loss_of: Callable[[], Tensor]) -> list[float]:
    """Weight decay on what is no vector, told by dims and by names, and a schedule made of two."""
    named = list(model.named_parameters())
    decayed = [p for n, p in named if p.dim() > 1 and "wpe" not in n]
    rest = [p for n, p in named if p.dim() <= 1 or "wpe" in n]
    optimizer = AdamW([{"params": decayed, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0, "lr": 1e-2}],
                      lr=3e-3)
    schedule = SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, 4)], [2])
    return steps(model, loss_of, optimizer, schedule)


def one_cycle(model: nn.Module, loss_of: Callable[[], Tensor]) -> list[float]:
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    return steps(model, loss_of, optimizer, OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1))


def frozen(model: nn.Module, loss_of: Callable[[], Tensor]) -> list[float]:
    """Every other parameter stays as it is."""
    named = dict(model.named_parameters())
    fixed = {n: whole(p).clone() for n, p in itertools.islice(named.items(), 0, None, 2)}
    assert not any(named[n].requires_grad for n in fixed)
    losses = steps(model, loss_of, AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3))
    assert all(torch.equal(whole(named[n]).reshape(before.shape), before) for n, before in fixed.items())
    return losses


def averaged(model: nn.Module, loss_of: Callable[[], Tensor]) -> list[float]:
    """A moving average of parameters beside them, put in their place at the end; a state kept and gone back to."""
    optimizer = AdamW(model.parameters(), lr=1e-2)
    shadow = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = copy.deepcopy(model.state_dict())
    losses = []
    for _ in range(STEPS):
        losses += steps_of_one(loss_of, optimizer)
        with torch.no_grad():
            for n, p in model.named_parameters():
                shadow[n].lerp_(p.detach(), 0.3)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(shadow[n])
    losses.append(float(loss_of().detach()))
    model.load_state_dict(start)
    return [*losses, float(loss_of().detach())]


def steps_of_one(loss_of: Callable[[], Tensor], optimizer: Optimizer) -> list[float]:
    loss = loss_of()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return [float(loss.detach())]


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


LOOPS: dict[str, Loop] = {
    **{name: with_optimizer(name) for name in OPTIMIZERS},
    "accumulating": accumulating, "kept gradients": kept_gradients, "grouped": grouped, "one cycle": one_cycle,
    "frozen": frozen, "averaged": averaged,
}


FEW = ["adamw-foreach", "adagrad", "lion", "accumulating", "grouped", "frozen", "averaged"]


def case_for(name: str, loop: str) -> Case:
    case = CASES[name]()
    if loop == "frozen":
        for parameter in list(case.model.parameters())[::2]:
            parameter.requires_grad_(False)
    return case


def curves(rank: int, world_size: int, name: str, way: Way, loops: list[str]) -> dict[str, list[float]]:
    found = {}
    for loop in loops:
        case = case_for(name, loop)
        model = way.compile(case, world_size)
        found[loop] = LOOPS[loop](model, lambda: case.call(model))  # noqa: B023
    return found


def plain_curve(name: str, loop: str) -> list[float]:
    case = case_for(name, loop)
    return LOOPS[loop](case.model, lambda: case.plain_loss(case.model))


@pytest.mark.parametrize(("name", "way"), [
    ("mlp", Way("zero3")), ("mlp", Way("1d")), ("mlp", Way("zero3", ahead=False)),
    *(pytest.param("gpt2", way, marks=pytest.mark.slow)
      for way in (Way("auto", True, (2, 2)), Way("zero+1d", False, (2, 2)), Way("2d", True, (2, 2)))),
], ids=str)
def test_loops_are_the_plain_models(pool: Pools, name: str, way: Way) -> None:
    chosen = list(LOOPS) if name == "mlp" else FEW
    loops = [loop for loop in chosen if way.ahead or loop != "averaged"]  # whose copies are made before the first call
    for found in pool(torch.Size(way.mesh).numel()).run(curves, name, way, loops):
        wrong = {loop: (curve, wanted) for loop, curve in found.items()
                 if curve != pytest.approx(wanted := plain_curve(name, loop), abs=TOLERANCE)}
        assert not wrong


# Optimizers that look at rows and columns.

class RowsAndColumns(SGD):
    """Gradients divided by root mean squares of their rows and columns, as Adafactor's; torch's takes no DTensors."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            square = parameter.grad.square() + 1e-12
            if parameter.dim() == 2:
                rows, columns = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
                square = rows * columns / rows.mean()
            parameter.sub_(parameter.grad * (square + 1e-6).rsqrt(), alpha=self.param_groups[0]["lr"])


SHAPED: dict[str, Callable[[Any], Optimizer]] = {
    "rows and columns": lambda p: RowsAndColumns(p, lr=1e-3),
    "muon": lambda p: torch.optim.Muon([each for each in p if each.dim() == 2], lr=1e-3),
}


def shaped_curves(rank: int, world_size: int, mode: str) -> dict[str, list[float]]:
    found = {}
    for name, make in SHAPED.items():
        case = CASES["gpt2"]()
        shapes = {n: p.shape for n, p in case.model.named_parameters()}
        model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, mode=mode, precision="fp32",
                                keep_shapes=True)
        assert {n: p.shape for n, p in model.named_parameters()} == shapes
        found[name] = steps(model, lambda: case.call(model), make(model.parameters()))  # noqa: B023
    return found


@pytest.mark.parametrize("mode", ["zero3", pytest.param("1d", marks=pytest.mark.slow)])
def test_shapes_are_kept_for_optimizers_that_look_at_them(pool: Pools, mode: str) -> None:
    wanted = {}
    for name, make in SHAPED.items():
        case = CASES["gpt2"]()
        wanted[name] = steps(case.model, lambda: case.plain_loss(case.model), make(case.model.parameters()))  # noqa: B023
    for found in pool(2).run(shaped_curves, mode):
        for name, curve in found.items():
            assert curve == pytest.approx(wanted[name], abs=10 * TOLERANCE), name
