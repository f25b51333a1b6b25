"""Programs of single calls and of tiny models, captured and annotated."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopar.api import arguments
from autopar.passes.capture import Precision, Program, Source, capture
from autopar.passes.constants import FoldConstants
from autopar.passes.decision import Context, context
from autopar.passes.normalize import Normalize
from autopar.passes.segments import annotate
from autopar.planner import prepare
from tests.builders import Case, gpt2, mlp, resnet

MODELS: dict[str, Callable[[], Case]] = {"mlp": mlp, "gpt2": gpt2, "resnet": partial(resnet, size=32)}


class Call(nn.Module):
    """One call on operands in their order; parameters and buffers among them are held, the others are inputs."""

    def __init__(self, call: Callable[..., Any], operands: list[Tensor]) -> None:
        super().__init__()
        self.call = call
        self.held = [f"held{n}" if isinstance(o, nn.Parameter | nn.Buffer) else "" for n, o in enumerate(operands)]
        for name, operand in zip(self.held, operands, strict=True):
            if name:
                setattr(self, name, operand)

    def forward(self, *inputs: Tensor) -> Any:
        rest = iter(inputs)
        return self.call(*(getattr(self, name) if name else next(rest) for name in self.held))


def raw(call: Callable[..., Any], *operands: Tensor, precision: Precision = "fp32") -> Program:
    """`call` as it is captured."""
    module = Call(call, list(operands))
    inputs = tuple(o for o, name in zip(operands, module.held, strict=True) if not name)
    return capture(module, (inputs, {}), precision)


def program(call: Callable[..., Any], *operands: Tensor, precision: Precision = "fp32") -> Program:
    """`call` captured, normalised, its constants folded."""
    return prepared(raw(call, *operands, precision=precision))


def prepared(found: Program) -> Program:
    """A captured program normalised, its constants folded; its outputs are kept."""
    return FoldConstants()(Normalize()(found))


def annotated(call: Callable[..., Any], *operands: Tensor, precision: Precision = "fp32") -> Context:
    """`call` with factors, ops and segments."""
    return context(annotate(program(call, *operands, precision=precision)))


@cache
def model_context(name: str, precision: Precision = "fp32") -> Context:
    """The annotated training program of the tiny model called `name`."""
    case = MODELS[name]()
    return prepare(capture(case.model, arguments(case.inputs), precision, case.loss_fn))


def targets(found: Program) -> list[str]:
    """The ops that a program calls, in order, without `aten.` and overload."""
    return [str(n.target).removeprefix("aten.").partition(".")[0] for n in found.graph.nodes if n.op == "call_function"]


class OnCpu(fx.Interpreter):
    """Runs a graph that was captured on meta."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, *pytree.tree_map_only(torch.device, lambda _: "cpu", (args, kwargs)))


def evaluated(found: Program, *operands: Tensor) -> Any:
    """What a program of a call returns on its operands."""
    held = {f"held{n}": o for n, o in enumerate(operands) if isinstance(o, nn.Parameter | nn.Buffer)}
    inputs = iter(o for o in operands if not isinstance(o, nn.Parameter | nn.Buffer))

    def value(source: Source) -> Tensor:
        if source.kind == "input":
            return next(inputs)
        return found.constants[source.name] if source.kind == "constant" else held[source.name]

    values = [value(found.sources[n.name]) for n in found.graph.nodes if n.op == "placeholder"]
    outputs = OnCpu(nn.Module(), graph=found.graph).run(*values)
    return outputs[0] if len(outputs) == 1 else outputs
