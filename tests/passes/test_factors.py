"""Factors: what a dim is a product of, what is tied to what, which values only rename others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autopar.core.mesh import Mesh
from autopar.passes.decision import Decision
from autopar.passes.factors import Factored
from autopar.passes.modes import MODES
from autopar.passes.strategies import assignments, storage_dims
from tests.programs import annotated
from tests.simulator import assert_same, everything_differentiable, reference, simulated


def w(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def factored(call: Callable[..., Any], *operands: Tensor) -> Factored:
    return annotated(call, *operands).segmented.factored


def node(found: Factored, name: str) -> fx.Node:
    return next(n for n in found.program.graph.nodes if n.name == name)


def sizes(found: Factored, name: str) -> list[tuple[int, ...]]:
    """The factor sizes of each dim."""
    return [tuple(found.sizes[f] for f in dim) for dim in found.dims[node(found, name)]]


def attention(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GPT-2's: a fused projection of (batch, sequence, 12) to 3 x 4 heads x 3."""
    q, k, v = torch.addmm(bias, x.view(-1, 12), weight).view(2, 5, 36).split(12, -1)
    q, k, v = (part.view(2, 5, 4, 3).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 5, 12)


def test_a_fused_projection_is_parts_by_heads_by_dim() -> None:
    found = factored(attention, torch.randn(2, 5, 12), w(12, 36), w(36))
    assert sizes(found, "p_held1") == [(12,), (3, 4, 3)]
    assert sizes(found, "inputs_0") == [(2,), (5,), (12,)]
    assert sizes(found, "view") == [(2, 5), (12,)]
    weight = node(found, "p_held1")
    parts, heads, _ = found.dims[weight][1]
    assert found.selected == {parts}
    query = next(n for n in found.program.graph.nodes if "scaled_dot" in str(n.target)).args[0]
    assert found.dims[query][1] == (heads,)
    assert storage_dims(found, weight) == ((0,), (1,), (2, 3))
    assert storage_dims(found, node(found, "p_held2")) == ((0, 1, 2),)
    kept = replace(found, program=replace(found.program, stored="plain"))
    assert storage_dims(kept, weight) == ((0,), (1, 2, 3))


@pytest.mark.parametrize(("call", "shape", "expected"), [
    (lambda x: x.view(-1, 6), (2, 5, 6), [(2,), (5,), (6,)]),
    (lambda x: x.view(2, 5, 2, 3), (2, 5, 6), [(2,), (5,), (2, 3)]),
    (lambda x: x.reshape(60), (2, 5, 6), [(2,), (5,), (6,)]),
    (lambda x: x.view(4, 3, 5), (2, 6, 5), [(2,), (2, 3), (5,)]),
    (lambda x: x.flatten(1), (2, 3, 4), [(2,), (3,), (4,)]),
    (lambda x: x.unflatten(1, (2, 4)), (3, 8), [(3,), (2, 4)]),
    (lambda x: x.unsqueeze(1), (2, 3), [(2,), (3,)]),
    (lambda x: x.squeeze(1), (2, 1, 3), [(2,), (), (3,)]),
    (lambda x: x.squeeze(), (1, 4, 1), [(), (4,), ()]),
    (lambda x: x.transpose(0, 2), (2, 3, 4), [(2,), (3,), (4,)]),
    (lambda x: x.permute(2, 0, 1), (2, 3, 4), [(2,), (3,), (4,)]),
    (lambda x: x.permute(-1, 0, 1).reshape(8, 3), (2, 3, 4), [(2,), (3,), (4,)]),
    (lambda x: x.t(), (2, 3), [(2,), (3,)]),
    (lambda x: x.contiguous().clone(), (2, 3), [(2,), (3,)]),
    (lambda x: x.split(4, 1)[1], (2, 12), [(2,), (3, 4)]),
    (lambda x: x.chunk(2)[0], (6, 5), [(2, 3), (5,)]),
    (lambda x: x.split(4, 1)[0].view(2, 2, 2), (2, 12), [(2,), (3, 2, 2)]),
])
def test_renamings_share_their_factors(call: Callable[..., Tensor], shape: tuple[int, ...],
                                       expected: list[tuple[int, ...]]) -> None:
    found = factored(lambda x: call(x).neg(), torch.randn(shape))
    assert sizes(found, "inputs_0") == expected
    source, made = node(found, "inputs_0"), node(found, "neg").args[0]
    base, index = found.base(made)
    assert base is source
    assert found.flat(made) == tuple(found.flat(source)[i] for i in index)
    assert whole_size(found, made) == call(torch.empty(shape)).numel()


def whole_size(found: Factored, made: Any) -> int:
    return math.prod(found.refined(made))


@pytest.mark.parametrize(("call", "shape"), [
    (lambda x: x.view(8, 3), (6, 4)),
    (lambda x: x.view(2, 9, 4), (2, 6, 6)),
    (lambda x: x.split(5, 1)[0], (2, 12)),
    (lambda x: x.split([4, 8], 1)[1], (2, 12)),
    (lambda x: x.chunk(5, 1)[0], (2, 13)),
])
def test_what_does_not_nest_shares_nothing(call: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    found = factored(lambda x: call(x).neg(), torch.randn(shape))
    made = node(found, "neg").args[0]
    assert found.base(made) == (made, tuple(range(len(found.flat(made)))))


def test_a_tied_weight_ties_the_dims_of_its_users() -> None:
    def call(ids: Tensor, table: Tensor) -> Tensor:
        return F.linear(F.embedding(ids, table).view(2, 3, 2, 3).flatten(2), table)

    found = factored(call, torch.zeros(2, 3, dtype=torch.long), w(12, 6))
    assert sizes(found, "p_held1") == [(12,), (2, 3)]
    assert found.dims[node(found, "linear")][-1] == found.dims[node(found, "p_held1")][0]
    assert found.dims[node(found, "embedding")][-1] == found.dims[node(found, "p_held1")][1]


def test_a_later_op_refines_earlier_values() -> None:
    found = factored(lambda x, v: (x @ v).view(4, 2, 5).neg(), torch.randn(4, 6), w(6, 10))
    assert sizes(found, "p_held1") == [(6,), (2, 5)]
    assert sizes(found, "matmul") == [(4,), (2, 5)]


# Random chains of renamings: cut on any factor and renamed again on local shapes, they come to the same.

DIMS = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3)


def factorings(size: int, dims: int) -> list[tuple[int, ...]]:
    """Shapes of `dims` dims with `size` elements."""
    if dims == 1:
        return [(size,)]
    return [(d, *rest) for d in range(1, size + 1) if size % d == 0 for rest in factorings(size // d, dims - 1)]


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, tuple[Any, ...]]]]:
    """A shape and steps (method, arguments) on it; a split goes on with one part, or with the sum of all."""
    shape = draw(DIMS)
    now, steps = list(shape), []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["view", "transpose", "permute", "split", "sum"]))
        if kind == "view":
            after = draw(st.sampled_from(factorings(math.prod(now), draw(st.integers(1, 4)))))
            steps.append(("reshape", after))
            now = list(after)
        elif kind in ("transpose", "permute"):
            order = draw(st.permutations(range(len(now))))
            steps.append(("permute", tuple(order)))
            now = [now[i] for i in order]
        else:
            dim = draw(st.integers(0, len(now) - 1))
            parts = draw(st.sampled_from([n for n in range(1, now[dim] + 1) if now[dim] % n == 0]))
            steps.append((kind, (parts, dim, draw(st.integers(0, parts - 1)))))
            now[dim] //= parts
    return shape, steps


def follow(x: Tensor, steps: list[tuple[str, tuple[Any, ...]]]) -> Tensor:
    for kind, arguments in steps:
        if kind in ("split", "sum"):
            parts, dim, taken = arguments
            pieces = x.split(x.shape[dim] // parts, dim)
            x = pieces[taken] if kind == "split" else sum(pieces[1:], pieces[0])
        else:
            x = getattr(x, kind)(*arguments)
    return x


@settings(max_examples=40, deadline=None)
@given(chains())
def test_renamings_of_a_part_are_the_part_of_renamings(chain: tuple[list[int], list[Any]]) -> None:
    shape, steps = chain
    x = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) / 7
    def call(t: Tensor) -> Tensor:
        return follow(t.sin(), steps).neg()
    context = everything_differentiable(annotated(call, x))
    wanted = reference(context, call, {"inputs_0": x})
    for parts in (2, 3):
        mesh = Mesh((parts,))
        ways = [assignments(op, mesh, MODES["auto"], True) for op in context.segmented.ops]
        for taken in itertools.islice(itertools.product(*ways), 12):
            found = simulated(Decision(context, mesh, taken, {}), {"inputs_0": x})
            assert_same(found, wanted, 1e-5)
