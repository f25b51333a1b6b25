"""Programs of single calls: a function on inputs, parameters and buffers, captured and annotated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autopar.passes.capture import Precision, Program, capture
from autopar.passes.constants import FoldConstants
from autopar.passes.decision import Context, context
from autopar.passes.normalize import Normalize
from autopar.passes.segments import annotate


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


def targets(found: Program) -> list[str]:
    """The ops that a program calls, in order, without `aten.` and overload."""
    return [str(n.target).removeprefix("aten.").partition(".")[0] for n in found.graph.nodes if n.op == "call_function"]


def evaluated(found: Program, *operands: Tensor) -> Any:
    """What a program of `call` returns on its operands."""
    values = dict(zip((n.name for n in found.graph.nodes if n.op == "placeholder"), (), strict=False))
    by_source = {f"held{n}": o for n, o in enumerate(operands) if isinstance(o, nn.Parameter | nn.Buffer)}
    inputs = iter(o for o in operands if not isinstance(o, nn.Parameter | nn.Buffer))
    for node in found.graph.nodes:
        if node.op == "placeholder":
            source = found.sources[node.name]
            values[node.name] = found.constants[node.name] if source.kind == "constant" else (
                by_source[source.name] if source.kind != "input" else next(inputs))
    interpreter = torch.fx.Interpreter(nn.Module(), graph=found.graph)
    outputs = interpreter.run(*values.values())
    return outputs[0] if len(outputs) == 1 else outputs
