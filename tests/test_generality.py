"""Hugging Face families in train mode, as their authors wrote them: planned, every contraction by a rule."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from torch import nn

from autopar.api import arguments
from autopar.core.cluster import Cluster
from autopar.passes.capture import capture
from autopar.passes.decision import Context
from autopar.plan import Plan
from autopar.planner import Request, prepare, solve, verify
from tests.families import LAYERS, SEEN, as_written

MESHES = [(4,), (2, 2)]
CLUSTER = Cluster.preset("4xA100-80GB")
HEAVY = re.compile(r"mm\b|matmul|linear|conv|attention|einsum|\bdot\b|\bmv\b")
"""What does nearly all the work of a model, in the names of aten ops."""


@cache
def traced(name: str) -> Context:
    case = as_written(name)
    return prepare(capture(case.model, arguments(case.inputs), "bf16-mixed", case.loss_fn))


@cache
def planned(name: str, mesh: tuple[int, ...]) -> Plan:
    return solve(traced(name), CLUSTER, Request(name, mesh=mesh, solver="highs"))[0]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", SEEN)
def test_planned_unmodified(name: str, mesh: tuple[int, ...]) -> None:
    plan = planned(name, mesh)
    assert verify(plan, traced(name), CLUSTER) == pytest.approx((plan.step_time_s, plan.memory.total), rel=1e-6)
    assert plan.mesh == mesh and plan.gap <= 1e-6


@pytest.mark.parametrize("name", SEEN)
def test_no_op_runs_replicated_for_want_of_a_rule(name: str) -> None:
    assert planned(name, (4,)).fallback_ops == ()


@pytest.mark.parametrize("name", SEEN)
def test_every_contraction_of_the_program_is_in_an_op_with_a_rule(name: str) -> None:
    context = traced(name)
    heavy = {n for n in context.segmented.factored.program.graph.nodes if HEAVY.search(str(n.target))
             and n.op == "call_function"}
    ruled = {node for op in context.segmented.ops if op.has_rule for node in op.nodes}
    assert len(heavy) > LAYERS and heavy <= ruled


def test_their_dropout_is_there() -> None:
    rates = [module.p for name in ("gpt2", "bert", "opt", "bart", "t5") for module in as_written(name).model.modules()
             if isinstance(module, nn.Dropout)]
    assert any(rates)
    random = {torch.ops.aten.dropout.default, torch.ops.aten.rand.default}
    assert any(node.target in random for node in traced("gpt2").segmented.factored.program.graph.nodes)
