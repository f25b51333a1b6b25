"""Dims that don't divide over an axis are never offered cut over it."""

from __future__ import annotations

import pytest

from autopar.api import arguments
from autopar.core.mesh import Mesh
from autopar.passes.capture import capture
from autopar.passes.decision import Context
from autopar.passes.modes import MODES
from autopar.passes.strategies import assignments, axes_of, storages
from autopar.planner import prepare
from tests.builders import Case, gpt2

VOCAB, HEADS = 97, 5
"""As of GPT-2's 50257 words and GPT-2 XL's 25 heads: odd."""
MESHES = [Mesh((4,)), Mesh((2,)), Mesh((2, 2)), Mesh((2, 4)), Mesh((2, 2, 2))]


def odd() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(n_layer=1, n_head=HEADS, n_embd=8 * HEADS, vocab_size=VOCAB, n_positions=32, use_cache=False)
    return Case(GPT2LMHeadModel(config).train(), gpt2().inputs)


@pytest.fixture(scope="module")
def context() -> Context:
    case = odd()
    return prepare(capture(case.model, arguments(case.inputs), "fp32"))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_factor_divides_in_every_assignment(context: Context, mesh: Mesh) -> None:
    """Axes of size 2 and 4 meet sizes of 97 and 5, which stay whole, and of 8, 16 and 40, which are cut."""
    cut, sizes = set(), set()
    for op in context.segmented.ops:
        for found in assignments(op, mesh, MODES["auto"], gradients=True):
            for factor in op.factors:
                sizes.add(factor.size)
                parts = mesh.extent(axes_of(found, factor.key))
                assert factor.size % parts == 0
                cut |= {factor.size} if parts > 1 else set()
    assert {VOCAB, HEADS} <= sizes and not {VOCAB, HEADS} & cut and cut & {8, 16, 40}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_factor_divides_in_every_storage(context: Context, mesh: Mesh) -> None:
    """What is gathered for use may rest in uneven parts, as what is gathered is the whole."""
    factored = context.segmented.factored
    odd_factors = 0
    for node, users in context.parameters().items():
        sizes = factored.refined(node)
        odd_factors += len({VOCAB, HEADS} & set(sizes))
        for storage in storages(factored, node, users, mesh, MODES["auto"]):
            for place, size in enumerate(sizes):
                assert size % mesh.extent(tuple(a for a, s in enumerate(storage.states) if s == place)) == 0
    assert odd_factors > 0
