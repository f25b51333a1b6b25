"""A lean export makes the same graph as torch's own: op by op, with the same names, values and module paths."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autopar.passes import private
from autopar.passes.capture import capture, meta_twin
from tests import builders, families
from tests.programs import MODELS

X = torch.randn(4, 6)


class Net(nn.Module):
    """A forward given as a function of the module and an input (4, 6)."""

    def __init__(self, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.twice = nn.ModuleList([self.layer, self.layer])
        self.register_buffer("seen", torch.zeros(6))
        self.plain = torch.arange(6.0)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def written(net: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] = 2
    y.select(0, 0).add_(1).mul_(y[1])
    y.t_()
    return y.sum()


def without_gradient(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = net.layer(x).exp()
    return (x * scale).sum()


def autocast(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.layer(x)
    return y.float().sum()


def constants(net: Any, x: Tensor) -> Tensor:
    three = torch.tensor(3) * 2
    return x.sum() * three.item() + torch.tensor([1.0, 2.0]).sum() + (x * net.plain.to(x.device)).sum()


def several(net: Any, x: Tensor) -> Any:
    values, places = x.max(dim=1)
    first, *_ = x.split([1, 2, 3], dim=1)
    return {"a": (values, places.float()), "b": [first, *x.unbind(0)], "c": torch.meshgrid(x[0], x[1], indexing="ij")}


def assigned(net: Any, x: Tensor) -> Tensor:
    net.seen = net.seen + x.sum(0)
    net.seen.mul_(0.9)
    return net.norm(x).sum()


def branches(net: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,)).sum()


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "written": written, "without gradient": without_gradient, "autocast": autocast, "constants": constants,
    "several": several, "assigned": assigned, "branches": branches,
    "indexed": lambda net, x: x[None, ..., 1::2][:, [0, 2]][..., torch.arange(2, device=x.device)],
    "called twice": lambda net, x: net.twice[1](net.twice[0](net.layer(x))),
    "random": lambda net, x: net.drop(x) + torch.rand_like(x) + torch.rand(4, 1, device=x.device),
    "checkpointed": lambda net, x: checkpoint(net.layer, x, use_reentrant=False).sum(),
    "keywords": lambda net, x: torch.addmm(x[0], x, net.layer.weight, beta=2, alpha=0.5).sum(dim=1, dtype=torch.double),
    "attention": lambda net, x: F.scaled_dot_product_attention(*[x.view(2, 2, 1, 6)] * 3, is_causal=True),
    "complex": lambda net, x: torch.view_as_real(torch.fft.fft(x)).sum(),
    "sizes": lambda net, x: x.new_zeros(x.shape).to(torch.int8).reshape(x.numel()).contiguous().expand(3, -1),
    "lifted": lambda net, x: torch.ops.aten.lift_fresh(x.sin()),
    "returned": lambda net, x: (x, net.layer.weight, None, 3),
}


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on capture exports as torch does."""
    monkeypatch.setattr("autopar.passes.private.lean_export", contextlib.nullcontext)


def figures(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [figures(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.device, value.requires_grad


def told(graph: fx.Graph) -> list[Any]:
    """All that is to be the same, subgraphs included."""
    found = []
    for node in graph.nodes:
        inner = getattr(graph.owning_module, node.target) if node.op == "get_attr" else None
        found.append((node.op, node.name, str(node.target), str(node.args), str(node.kwargs),
                      figures(node.meta.get("val")), node.meta.get("nn_module_stack"),
                      told(inner.graph) if isinstance(inner, fx.GraphModule) else None))
    return found


def exported(model: nn.Module, x: Tensor) -> tuple[list[Any], str, list[str]]:
    found = torch.export.export(meta_twin(model), (x.to("meta"),), strict=False)
    return told(found.graph_module.graph), str(found.graph_signature), sorted(found.constants)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_export_is_the_same(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = Net(CALLS[name]).train(training)
    with private.lean_export():
        lean = exported(model, X)
    assert lean == exported(model, X)


@pytest.mark.parametrize("name", [*MODELS, *families.FAMILIES])
def test_the_program_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MODELS[name]() if name in MODELS else families.as_written(name)
    call = ((), case.inputs) if isinstance(case.inputs, dict) else (case.inputs, {})
    lean = capture(case.model, call, "bf16-mixed", case.loss_fn)
    plain(monkeypatch)
    own = capture(case.model, call, "bf16-mixed", case.loss_fn)
    assert told(lean.graph) == told(own.graph) and lean.sources == own.sources
    assert (lean.in_spec, lean.out_spec) == (own.in_spec, own.out_spec)
    assert all(torch.equal(value, own.constants[key]) for key, value in lean.constants.items())


def branch(net: Any, x: Tensor) -> Tensor:
    return net.layer(x).sum() if x.sum() > 0 else x.sum()


@pytest.mark.parametrize("call", [
    branch,
    lambda net, x: x[x > 0].sum(), lambda net, x: x.nonzero().sum(), lambda net, x: torch.where(x)[0].sum(),
    lambda net, x: net.layer(x).sum() * x.max().item(), lambda net, x: x.unique(return_counts=True)[1].sum(),
])
def test_what_depends_on_values_is_told_as_ever(call: Callable[[Any, Tensor], Any],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = []
    for prepare in (lambda _: None, plain):
        prepare(monkeypatch)
        with pytest.raises(Exception, match=r"depends on the values|data-dependent") as refusal:
            capture(Net(call), ((X,), {}))
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1] and __file__ in refusals[0]


def test_nothing_is_left_behind() -> None:
    def current() -> list[Any]:
        return [vars(owner).get(name) for owner, name, _ in private._STAND_INS]

    before, case = current(), builders.mlp()
    with pytest.raises(ZeroDivisionError), private.lean_export():
        assert all(now is not own for now, own in zip(current(), before, strict=True))
        _ = 1 / 0
    assert current() == before
    made = torch.export.export(case.model, case.inputs[:1], strict=False)
    assert any(node.stack_trace for node in made.graph.nodes)


def test_a_lean_export_leaves_out_what_nobody_reads() -> None:
    case = builders.mlp()
    with private.lean_export():
        made = torch.export.export(case.model, case.inputs[:1], strict=False)
    assert all("stack_trace" not in node.meta and node.meta.get("tensor_meta") is None for node in made.graph.nodes)
    assert torch.equal(made.module()(case.inputs[0]), case.model(case.inputs[0]))
