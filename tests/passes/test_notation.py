"""How decisions print."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.core.mesh import Mesh
from autopar.passes.decision import Context, Decision
from autopar.passes.notation import merged, op_text, parameter_text
from autopar.passes.strategies import Storage, parse_storage
from tests.programs import annotated, model_context

MESH = Mesh((2, 2))


def w(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def decided(context: Context, last: tuple[str, ...], storage: str = "R,R") -> Decision:
    """The last op as said, every parameter resting as said."""
    idle = ("R",) * len(MESH.shape)
    ops = context.segmented.ops
    stored: dict[Any, Storage] = dict.fromkeys(context.parameters(), parse_storage(storage))
    return Decision(context, MESH, (*(idle for _ in ops[:-1]), last), stored)


@pytest.mark.parametrize(("call", "operands", "assignment", "text"), [
    (F.linear, (torch.randn(4, 4), w(4, 4)), ("R", "R"), "RR = RR X RR"),
    (F.linear, (torch.randn(4, 4), w(4, 4)), ("e0", "e0"), "S01R = S01R X RR"),
    (F.linear, (torch.randn(4, 4), w(4, 4)), ("e0", "n"), "S0S1 = S0R X RS1"),
    (F.linear, (torch.randn(4, 4), w(4, 4)), ("n", "e0"), "S1S0 = S1R X RS0"),
    (F.linear, (torch.randn(4, 4), w(4, 4), w(4)), ("e0", "k"), "S0R(P1) = S0S1 X S1R"),
    (F.linear, (torch.randn(4, 4), w(4, 4)), ("k", "k"), "RR(P01) = RS01 X S01R"),
    (F.linear, (torch.randn(4, 4, 4), w(4, 4)), ("e0", "e1"), "S01R = S01R X RR"),
    (torch.addmm, (w(4), torch.randn(4, 4), w(4, 4)), ("m", "n"), "S0S1 = S0R X RS1"),
    (F.conv2d, (torch.randn(4, 4, 3, 3), w(4, 4, 2, 2)), ("n", "o"), "S0S1 = S0R X RS1"),
    (F.conv2d, (torch.randn(4, 4, 3, 3), w(4, 4, 2, 2)), ("c", "n"), "S1R(P0) = S1S0 X S0R"),
    (torch.bmm, (torch.randn(4, 4, 4), torch.randn(4, 4, 4)), ("b", "m"), "S01R = S01R X RR"),
    (torch.mul, (torch.randn(4, 4), w(4)), ("o0", "o1"), "S0S1 = S1"),
    (torch.neg, (torch.randn(4, 4),), ("o0", "o1"), "S0S1"),
    (lambda v: v.softmax(-1), (w(4, 4, 4),), ("o0", "o1"), "S0S1R = S0S1R"),
    (lambda v: v.sum(-1), (w(4, 4),), ("o0", "o1"), "S0(P1) = S0S1"),
    (lambda i, v: F.cross_entropy(v, i), (torch.zeros(4, dtype=torch.long), w(4, 4)), ("t", "R"), "R(P0) = S0R"),
    (lambda i, v: F.cross_entropy(v, i), (torch.zeros(4, dtype=torch.long), w(4, 4)), ("R", "R"), "R = RR"),
])
def test_op_text(call: Callable[..., Tensor], operands: tuple[Tensor, ...], assignment: tuple[str, ...],
                 text: str) -> None:
    decision = decided(annotated(call, *operands), assignment)
    assert op_text(decision, len(decision.assignments) - 1) == text


@pytest.mark.parametrize(("name", "storage", "text"), [
    ("transformer.h.0.attn.c_attn.weight", "R,R", "RRR"),
    ("transformer.h.0.attn.c_attn.weight", "0,2", "S0RS1"),
    ("transformer.h.0.attn.c_attn.weight", "Z,Z", "S01RR"),
    ("transformer.h.0.attn.c_attn.weight", "Z,0", "S1RS0"),
    ("transformer.h.0.attn.c_attn.bias", "Z,Z", "S01"),
    ("transformer.h.0.attn.c_proj.weight", "0,0", "S01R"),
    ("transformer.wte.weight", "0,1", "S0S1"),
    ("transformer.h.0.ln_1.weight", "R,Z", "S1"),
])
def test_parameter_text(name: str, storage: str, text: str) -> None:
    context = model_context("gpt2")
    sources = context.segmented.factored.program.sources
    node = next(n for n in context.parameters() if sources[n.name].name == name)
    decision = Decision(context, MESH, (), {node: parse_storage(storage)})
    assert parameter_text(decision, node) == text


def test_merged_specs_are_over_the_tensor_s_dims() -> None:
    context = annotated(lambda t: t.view(4, 6, 5).neg(), torch.randn(24, 5))
    factored = context.segmented.factored
    node = factored.program.placeholders("input")[0]
    spec = context.wanted(context.segmented.ops[0], context.segmented.ops[0].operands[0], ("o1", "o0"))
    assert (str(spec), str(merged(factored, node, spec))) == ("S1S0R", "S01R")
