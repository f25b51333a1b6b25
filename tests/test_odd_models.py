"""Models as people write them, each beside the plain one for some steps, or refused with what to do."""

from __future__ import annotations

import dataclasses
import linecache
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import autopar
from autopar.passes.capture import capture
from tests.builders import quick

STEPS, TOLERANCE = 3, 2e-5
WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0])


@dataclasses.dataclass
class Pair:
    """A batch."""

    x: Tensor
    labels: Tensor


@dataclasses.dataclass
class Output:
    """What a model returns."""

    loss: Tensor
    logits: Tensor
    extra: Tensor | None = None


class Net(nn.Module):
    """A forward given as a function of the module and its inputs, over two layers and what else it is given."""

    def __init__(self, run: Callable[..., Any], **held: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        for name, value in held.items():
            self.register_buffer(name, value) if isinstance(value, Tensor) else setattr(self, name, value)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)

    def logits(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.first(x).relu())
        return made


def scored(net: Any, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net.logits(x), labels)


def of_dataclasses(net: Any, batch: Pair) -> dict[str, Output]:
    logits = net.logits(batch.x)
    return {"made": Output(F.cross_entropy(logits, batch.labels), logits)}


def counting(net: Any, x: Tensor, labels: Tensor) -> Tensor:
    """Buffers that are updated in place and assigned, used in the same step."""
    net.steps += 1
    net.mean.lerp_(x.mean(0), 0.1)
    return F.cross_entropy(net.logits(x - net.mean) / net.steps, labels)


def watching(net: Any, x: Tensor, labels: Tensor) -> Tensor:
    """A running mean of hidden states, which no gradient goes through."""
    hidden = net.first(x)
    with torch.no_grad():
        net.mean.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
        net.most.copy_(torch.maximum(net.most, hidden.abs().amax()))
    return F.cross_entropy(net.last(hidden - net.mean) / net.most, labels)


def complex_numbers(net: Any, x: Tensor, labels: Tensor) -> Tensor:
    weight = torch.view_as_complex(net.weight)
    turned = torch.view_as_complex(net.first(x).unflatten(-1, (4, 2))) * torch.polar(torch.ones(4), torch.arange(4.0))
    return F.cross_entropy((x.to(torch.complex64) @ weight).abs() + torch.view_as_real(turned).sum(-1), labels)


def words(net: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net.logits(net.words(tokens).mean(1)), labels)


def held_elsewhere(net: Any, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net.logits(x), labels, weight=WEIGHTS) * WEIGHTS[None].mean()


def by_keyword(net: Any, *, x: Tensor, labels: Tensor, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    logits = net.logits(x) * scale
    return F.cross_entropy(logits, labels), logits


def holding(net: nn.Module, **parameters: nn.Module | nn.Parameter) -> nn.Module:
    for name, value in parameters.items():
        setattr(net, name, value)
    return net


def batch(samples: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 8), torch.randint(0, 4, (samples,))


@dataclasses.dataclass(frozen=True)
class Odd:
    """A model, what it is called with, what makes a loss of its output, and how the loss is found in that."""

    model: nn.Module
    inputs: Any
    loss_fn: Any = None
    find: Callable[[Any], Tensor] = lambda output: output

    def loss_of(self, model: nn.Module, compiled: bool) -> Tensor:
        if isinstance(self.inputs, dict):
            return self.find(model(**self.inputs))
        if self.loss_fn is not None and not compiled:
            made: Tensor = self.loss_fn(model(*self.inputs[:-1]), self.inputs[-1])
            return made
        return self.find(model(*self.inputs))


def sequence(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), nn.Linear(8, 4))


def twice(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), first, nn.Linear(8, 4))


SAME: dict[str, Callable[[], Odd]] = {
    "dataclasses in and out": lambda: Odd(Net(of_dataclasses), (Pair(*batch()),), find=lambda out: out["made"].loss),
    "keywords alone, a tuple out": lambda: Odd(Net(by_keyword), dict(zip(("x", "labels"), batch(), strict=True)),
                                               find=lambda out: out[0]),
    "buffers that count": lambda: Odd(Net(counting, steps=torch.zeros(()), mean=torch.zeros(8)), batch()),
    "buffers that watch": lambda: Odd(Net(watching, mean=torch.zeros(8), most=torch.ones(())), batch()),
    "complex numbers": lambda: Odd(holding(Net(complex_numbers), weight=nn.Parameter(torch.randn(8, 4, 2))), batch()),
    "sparse gradients": lambda: Odd(holding(Net(words), words=nn.Embedding(10, 8, sparse=True)),
                                    (torch.randint(0, 10, (8, 5)), batch()[1])),
    "tensors held elsewhere": lambda: Odd(Net(held_elsewhere), batch()),
    "a loss with weights": lambda: Odd(sequence(nn.Linear(8, 8)), batch(), nn.CrossEntropyLoss(
        weight=WEIGHTS, label_smoothing=0.1)),
    "a loss with tensors": lambda: Odd(sequence(nn.Linear(8, 8)), batch(), lambda output, labels: (
        F.cross_entropy(output, labels, reduction="none") * WEIGHTS[labels]).sum() / WEIGHTS[None].sum()),
    "orthogonal weights": lambda: Odd(sequence(parametrizations.orthogonal(nn.Linear(8, 8))), batch(),
                                      F.cross_entropy),
    "spectral norms": lambda: Odd(sequence(parametrizations.spectral_norm(nn.Linear(8, 8))), batch(), F.cross_entropy),
    "a spectral norm twice": lambda: Odd(twice(parametrizations.spectral_norm(nn.Linear(8, 8))), batch(),
                                         F.cross_entropy),
    "wrapped for several devices": lambda: Odd(nn.DataParallel(sequence(nn.Linear(8, 8))), batch(), F.cross_entropy),
    "one sample": lambda: Odd(sequence(nn.Linear(8, 8)), batch(1), F.cross_entropy),
    "sizes that divide by nothing": lambda: Odd(nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5)), batch(6),
                                                F.cross_entropy),
}


def curve(odd: Odd, model: nn.Module, compiled: bool) -> list[float]:
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(STEPS):
        loss = odd.loss_of(model, compiled)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def made(name: str, table: dict[str, Callable[[], Odd]]) -> Odd:
    torch.manual_seed(0)
    return table[name]()


def curves(rank: int, world_size: int) -> dict[str, list[float]]:
    found = {}
    for name in SAME:
        odd = made(name, SAME)
        model = autopar.compile(odd.model, quick(world_size), loss_fn=odd.loss_fn, precision="fp32")
        found[name] = curve(odd, model, compiled=True)
    return found


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_they_train_as_the_plain_models(pool: Any, ranks: int) -> None:
    wanted = {name: curve(odd, odd.model, compiled=False) for name in SAME if (odd := made(name, SAME))}
    for found in pool(ranks).run(curves):
        wrong = [name for name, losses in found.items() if losses != pytest.approx(wanted[name], abs=TOLERANCE)]
        assert not wrong, [(name, found[name], wanted[name]) for name in wrong]


def hooked(on: str) -> nn.Module:
    model = sequence(nn.Linear(8, 8))
    if on == "parameter":
        model[0].weight.register_hook(lambda grad: grad * 3)  # type: ignore[index,union-attr]
    else:
        model[0].register_full_backward_hook(lambda *_: None)  # type: ignore[index]
    return model


def clamped(net: Any, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        net.first.weight.clamp_(-0.1, 0.1)
    return scored(net, x, labels)


def cast(net: Any, x: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return scored(net, x, labels)


def uncast(net: Any, x: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return scored(net, x, labels)


def scaled_by_calls(net: Any, x: Tensor, labels: Tensor) -> Tensor:
    net.calls = getattr(net, "calls", 0) + 1
    return scored(net, x, labels) * net.calls


REFUSED: dict[str, tuple[Callable[[], Odd], str]] = {
    "a hook for a gradient": (lambda: Odd(hooked("parameter"), batch(), F.cross_entropy), "hooks .*0.weight; register"),
    "a backward hook": (lambda: Odd(hooked("module"), batch(), F.cross_entropy), "backward hooks, .*: 0; remove them"),
    "parameters written to": (lambda: Odd(Net(clamped), batch()), "first.weight in place .*after the optimizer's step"),
    "words that are scaled in place": (lambda: Odd(holding(Net(words), words=nn.Embedding(10, 8, max_norm=1.0)), (
        torch.randint(0, 10, (8, 5)), batch()[1])), "words.weight in place"),
    "counts in Python": (lambda: Odd(Net(scaled_by_calls), batch()), (
        r"changes calls \(absent to 1\) at .*test_odd_models.py:\d+ in scaled_by_calls, .*something else with that")),
    "autocast": (lambda: Odd(Net(cast), batch()), 'autocast to torch.bfloat16 on .*precision="bf16-mixed"'),
    "scripted": (lambda: Odd(torch.jit.script(sequence(nn.Linear(8, 8))), batch(), F.cross_entropy), "is scripted"),
    "no shapes yet": (lambda: Odd(sequence(nn.LazyLinear(8)), batch(), F.cross_entropy), "no shape yet.*call it once"),
    "complex parameters": (lambda: Odd(holding(nn.Linear(8, 4), w=nn.Parameter(torch.ones(2, dtype=torch.complex64))),
                                       batch(), F.cross_entropy), "are complex: w.*view_as_complex"),
    "a loss that learns": (lambda: Odd(nn.Linear(8, 4), batch(), nn.PReLU()), "loss_fn has parameters: weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_otherwise_is_refused(name: str) -> None:
    build, said = REFUSED[name]
    odd = build()
    with pytest.raises(autopar.AutoparError, match=said) as refusal:
        autopar.plan(odd.model, "cpu:2", inputs=odd.inputs, loss_fn=odd.loss_fn, precision="fp32")
    assert "\n" not in str(refusal.value)


def test_autocast_that_is_switched_off_is_none() -> None:
    autopar.plan(Net(uncast), "cpu:2", inputs=batch(), precision="fp32")


class Twice(nn.Module):
    """A frozen batch norm that is used twice, in the first and in the last but one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8).requires_grad_(False)
        self.layers, self.last = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers[:3]:  # type: ignore[union-attr]
            x = layer(self.norm(x)).relu()
        return F.cross_entropy(self.last(self.layers[3](x)), labels)


def test_a_buffer_that_is_written_in_several_places_has_one_stage() -> None:
    plan = autopar.plan(Twice(), "cpu:2", inputs=batch(), mode="pp", pp=2, precision="fp32")
    assert plan.stages[0].segments >= 5  # norm, layer, norm, layer, norm
    with pytest.raises(autopar.AutoparError, match=r"share buffers that the forward writes \(norm\."):
        autopar.plan(Twice(), "cpu:8", inputs=batch(), mode="pp", pp=8, micro_batches=1, precision="fp32")


def counting_calls(net: Any, x: Tensor, labels: Tensor) -> Tensor:
    net.calls += 1
    net.samples = len(x)
    return scored(net, x, labels)


def test_python_values_that_change_are_told(caplog: pytest.LogCaptureFixture) -> None:
    for way in (lambda model: capture(model, (batch(), {})),
                lambda model: autopar.plan(model, "cpu:2", inputs=batch())):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "autopar"):
            way(Net(counting_calls, calls=0))
        said = re.findall(r"changes calls \(0 to 1\) at .*test_odd_models.py:(\d+) in counting_calls, no tensor",
                          caplog.text)
        assert [linecache.getline(__file__, int(line)).strip() for line in said] == ["net.calls += 1"]


def evaluated(rank: int, world_size: int) -> str:
    torch.manual_seed(0)
    odd = Odd(sequence(nn.Linear(8, 8)), batch(), F.cross_entropy)
    model = autopar.compile(odd.model, quick(world_size), inputs=odd.inputs, loss_fn=odd.loss_fn, precision="fp32")
    model.eval()
    with torch.no_grad():
        assert not odd.loss_of(model, True).requires_grad
    with pytest.raises(autopar.AutoparError) as refusal:
        odd.loss_of(model, True).backward()
    return str(refusal.value)


@pytest.mark.dist
def test_a_backward_in_eval_mode_is_refused(pool: Any) -> None:
    assert all("in eval mode" in said and "model.train()" in said for said in pool(2).run(evaluated))
