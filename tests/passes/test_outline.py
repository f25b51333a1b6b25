"""What the program alone decides, against the specs of single assignments."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from autopar.core.mesh import Mesh
from autopar.core.spec import from_states
from autopar.passes.decision import Context, context
from autopar.passes.layout import from_base
from autopar.passes.modes import MODES
from autopar.passes.ops import Op
from autopar.passes.outline import OUTPUT, Arrival, outline
from autopar.passes.strategies import Assignment, assignments
from tests.programs import annotated, model_context

MODELS = ("mlp", "gpt2", "resnet")


def ways(ctx: Context, op: Op) -> list[Assignment]:
    return assignments(op, Mesh((2, 2)), MODES["auto"], ctx.through(op))


def arrivals(ctx: Context) -> list[Arrival]:
    return [arrival for run in outline(ctx).runs for arrival in run.arrivals]


@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_the_specs_that_ops_want(name: str) -> None:
    """Every operand of an op is wanted as some reader of the op says, under every assignment."""
    ctx = model_context(name)
    found, factored = outline(ctx), ctx.segmented.factored
    for arrival in arrivals(ctx):
        base, index = factored.base(arrival.value)
        rank = len(arrival.cargo.sizes)
        for reader in arrival.readers:
            if reader.key == OUTPUT:
                assert reader.states == {"R": "R"}
                continue
            op, _ = found.ops[reader.key]
            alike = [o for o in op.operands if ctx.rank(factored.base(o.node)[0]) == ctx.rank(base)]
            told = [from_states(tuple(map(reader.states.__getitem__, a)), rank) for a in ways(ctx, op)]
            assert told in [[from_base(ctx.wanted(op, o, a), index) for a in ways(ctx, op)] for o in alike]


@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_the_specs_that_ops_make(name: str) -> None:
    ctx = model_context(name)
    factored = ctx.segmented.factored
    for arrival in arrivals(ctx):
        base, index = factored.base(arrival.value)
        if arrival.states is None:
            assert base in outline(ctx).users
            continue
        op = ctx.segmented.ops[ctx.producer[base]]
        result = next(r for r in op.results if r.node is base)
        for a in ways(ctx, op):
            made = from_states(tuple(map(arrival.states.__getitem__, a)), len(arrival.cargo.sizes))
            assert made == from_base(ctx.emitted(op, result, a), index)


@pytest.mark.parametrize("name", MODELS)
def test_counts_come_to_the_whole_program(name: str) -> None:
    ctx = model_context(name)
    found = outline(ctx)
    assert sum(count for _, count in found.ops.values()) == len(found.op_keys) == len(ctx.segmented.ops)
    assert sum(count for _, count in found.parameters.values()) == len(found.users)
    assert sum(run.count for run in found.runs) == len(ctx.segmented.segments)
    assert {found.homes[node] for node in found.users} == set(found.parameters)


def test_an_outline_is_made_once_and_let_go_with_its_program() -> None:
    made = annotated(lambda x: x.relu(), torch.randn(4))
    ctx = context(made.segmented)
    assert outline(ctx) is outline(ctx)
    assert outline(ctx) is not outline(made)
    there = weakref.ref(ctx)
    del ctx
    gc.collect()
    assert there() is None
