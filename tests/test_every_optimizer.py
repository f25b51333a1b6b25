"""Every optimizer of torch.optim steps as on the plain model, ahead of time and lazily, with and without a closure, or
is refused with words."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import autopar
from tests.builders import Case, mlp, quick

pytestmark = pytest.mark.dist
Make = Callable[[Any], Optimizer]
STEPS, TOLERANCE = 4, 2e-5
STEPPING: dict[str, Make] = {
    "ASGD": lambda p: optim.ASGD(p, lr=0.05, t0=2),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "Adagrad, fused": lambda p: optim.Adagrad(p, lr=0.01, fused=True),
    "Adam": lambda p: optim.Adam(p, lr=3e-3, amsgrad=True, foreach=True),
    "AdamW": lambda p: optim.AdamW(p, lr=3e-3),
    "AdamW, fused": lambda p: optim.AdamW(p, lr=3e-3, fused=True),
    "Adamax": lambda p: optim.Adamax(p, lr=3e-3),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
    "Muon": lambda p: optim.Muon([each for each in p if each.dim() == 2], lr=1e-3),
    "NAdam": lambda p: optim.NAdam(p, lr=3e-3, foreach=True),
    "RAdam": lambda p: optim.RAdam(p, lr=3e-3),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "Rprop": lambda p: optim.Rprop(p, lr=1e-3),
    "Rprop, foreach": lambda p: optim.Rprop(p, lr=1e-3, foreach=True),
    "SGD": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD, fused": lambda p: optim.SGD(p, lr=0.05, fused=True),
}
REFUSED: dict[str, tuple[Make, type[Exception], str]] = {
    "Adafactor": (optim.Adafactor, autopar.AutoparError, "use an optimizer that treats every element alone"),
    "SparseAdam": (optim.SparseAdam, RuntimeError, "does not support dense gradients"),
}


def curve(make: Make, model: nn.Module, loss_of: Callable[[], Tensor], by_closure: bool) -> list[float]:
    optimizer, losses = make(model.parameters()), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    for _ in range(STEPS):
        loss = optimizer.step(closure) if by_closure else closure()
        if not by_closure:
            optimizer.step()
        losses.append(float(loss.detach()))
    if not isinstance(optimizer, optim.LBFGS):  # whose state is one vector of all
        assert all(isinstance(value, DTensor) for p, held in optimizer.state.items() if isinstance(p, DTensor)
                   for value in held.values() if isinstance(value, Tensor) and value.ndim)
    return losses


def compiled(case: Case, world_size: int, options: dict[str, Any], ahead: bool) -> nn.Module:
    model: nn.Module = autopar.compile(case.model, quick(world_size), inputs=case.inputs if ahead else None,
                                       loss_fn=case.loss_fn, precision="fp32", **options)
    return model


def tried(name: str, model: nn.Module, loss_of: Callable[[], Tensor], by_closure: bool) -> list[float]:
    """The curve of an optimizer, none where it is refused as it should be."""
    if name in STEPPING:
        return curve(STEPPING[name], model, loss_of, by_closure)
    make, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        curve(make, model, loss_of, by_closure)
    return []


def ahead(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, list[float]]:
    """Of one compiled model, from its first values each time."""
    case = mlp()
    model, found = compiled(case, world_size, options, ahead=True), {}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for name in [*STEPPING, *REFUSED]:
        model.load_state_dict(start)
        model.zero_grad()
        found[name] = tried(name, model, lambda: case.call(model), name == "LBFGS")
    return found


def lazily(rank: int, world_size: int, options: dict[str, Any], names: list[str]) -> dict[str, list[float]]:
    """The first step's closure compiles the model."""
    found, options = {}, dict(options)
    for name in names:
        case = mlp()
        model = compiled(case, world_size, options, ahead=False)
        found[name] = tried(name, model, lambda: case.call(model), True)  # noqa: B023
        options = {"plan": model.plan}  # which is the same each time
    return found


def test_the_table_has_every_optimizer() -> None:
    every = {name for name, value in vars(optim).items() if inspect.isclass(value) and value is not Optimizer
             and issubclass(value, Optimizer)}
    assert every == {name.partition(",")[0] for name in [*STEPPING, *REFUSED]}


def wanted(name: str, by_closure: bool) -> Any:
    case = mlp()
    return pytest.approx(curve(STEPPING[name], case.model, lambda: case.plain_loss(case.model), by_closure),
                         abs=TOLERANCE)


@pytest.mark.parametrize(("ranks", "options"), [
    (2, {"mode": "zero3"}), pytest.param(2, {"mode": "1d"}, marks=pytest.mark.slow),
    pytest.param(4, {"mode": "zero+1d", "mesh": (2, 2)}, marks=pytest.mark.slow)], ids=str)
def test_ahead_of_time(pool: Any, ranks: int, options: dict[str, Any]) -> None:
    for found in pool(ranks).run(ahead, options):
        assert [name for name in STEPPING if found[name] != wanted(name, name == "LBFGS")] == []


@pytest.mark.parametrize("names", [["Adagrad", "AdamW", "LBFGS", "Rprop"],
                                   pytest.param([*STEPPING, *REFUSED], marks=pytest.mark.slow)], ids=["few", "all"])
def test_lazily_by_a_closure(pool: Any, names: list[str]) -> None:
    for found in pool(2).run(lazily, {"mode": "zero3"}, names):
        assert [name for name in names if name in STEPPING and found[name] != wanted(name, True)] == []


def around_steps(rank: int, world_size: int) -> dict[str, str]:
    """What is refused at a step, and that gradients are where they were after one."""
    case, found = mlp(), {}
    early = optim.AdamW(case.model.parameters())
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn, precision="fp32")
    case.call(model).backward()
    with pytest.raises(autopar.AutoparError) as refusal:
        early.step()
    found["made too early"] = str(refusal.value)
    before = {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}
    own, other = list(model.parameters()), nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    optimizer = optim.SGD([{"params": own[:2]}, {"params": [*own[2:], other], "lr": 0.5}], lr=0.1)
    held = [p.detach().full_tensor().clone() for p in own]
    optimizer.step()
    assert all(torch.equal(p.grad.full_tensor(), before[name]) for name, p in model.named_parameters())
    assert torch.equal(other, torch.full((3,), 0.5)) and torch.equal(other.grad, torch.ones(3))
    for i, (old, (name, p)) in enumerate(zip(held, model.named_parameters(), strict=True)):
        assert torch.allclose(p.detach().full_tensor(), old - (0.1 if i < 2 else 0.5) * before[name]), name
    seen: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(all(isinstance(p.grad, DTensor) for p in own)))
    optimizer.step()
    assert seen == [True]
    return found


def test_around_steps(pool: Any) -> None:
    for found in pool(2).run(around_steps):
        assert "plain model that was compiled" in found["made too early"]


class Fused(nn.Module):
    """A weight that is stored as three."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(q * k + v).square().mean()


def shaped(rank: int, world_size: int) -> str:
    torch.manual_seed(0)
    model = autopar.compile(Fused(), quick(world_size), mode="1d", precision="fp32")
    optimizer = optim.Muon(model.parameters())
    model(torch.randn(8, 16)).backward()
    with pytest.raises(autopar.AutoparError) as refusal:
        optimizer.step()
    return str(refusal.value)


def test_shapes_that_an_optimizer_can_not_know_are_refused(pool: Any) -> None:
    assert all("qkv.weight" in said and "keep_shapes=True" in said for said in pool(2).run(shaped))
