"""Local shapes, and specs through renamings."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from autopar.core.mesh import Mesh
from autopar.core.spec import parse
from autopar.passes.layout import (
    based,
    carried,
    from_base,
    itemsize,
    local_bytes,
    local_factors,
    local_shape,
    to_base,
    whole_bytes,
)
from tests.programs import annotated, model_context

MESH = Mesh((2, 2))


@pytest.mark.parametrize(("spec", "factors", "shape"), [
    ("RRRRR", (4, 6, 3, 4, 8), (24, 96)),
    ("S0RRRR", (2, 6, 3, 4, 8), (12, 96)),
    ("S01RRRR", (1, 6, 3, 4, 8), (6, 96)),
    ("RS0RS1R", (4, 3, 3, 2, 8), (12, 48)),
    ("RRRS01R(P2)", (4, 6, 3, 1, 8), (24, 24)),
])
def test_local_shapes(spec: str, factors: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Of a (4·6, 3·4·8) value."""
    context = annotated(lambda x: x.view(4, 6, 96).view(4, 6, 3, 4, 8).neg(), torch.randn(24, 96))
    factored = context.segmented.factored
    node = next(iter(factored.program.graph.nodes))
    assert factored.refined(node) == (4, 6, 3, 4, 8)
    assert local_factors(factored, node, parse(spec), MESH) == factors
    assert local_shape(factored, node, parse(spec), MESH) == shape
    assert local_bytes(factored, node, parse(spec), MESH) == 4 * shape[0] * shape[1]


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16-mixed", 2), ("fp16-mixed", 2)])
def test_bytes_are_of_the_compute_dtype(precision: str, size: int) -> None:
    factored = model_context("mlp", precision).segmented.factored  # type: ignore[arg-type]
    linear = next(n for n in factored.program.graph.nodes if str(n.target) == "aten.linear.default")
    assert itemsize(linear) == size
    assert whole_bytes(factored, linear) == 8 * 32 * size
    labels = next(n for n in factored.program.placeholders("input") if n.meta["val"].dtype == torch.int64)
    assert itemsize(labels) == 8


@pytest.mark.parametrize(("spec", "index", "rank", "base"), [
    ("S0R", (0, 1), 2, "S0R"),
    ("S0S1", (1, 0), 2, "S1S0"),
    ("S0R", (2, 0), 3, "RRS0"),
    ("S0(P1)", (1,), 3, "RS0R(P1)"),
    ("RS01", (0, 2), 3, "RRS01"),
    ("R(G0)", (0,), 2, "RR(G0)"),
])
def test_specs_through_renamings(spec: str, index: tuple[int, ...], rank: int, base: str) -> None:
    assert str(to_base(parse(spec), index, rank)) == base
    assert str(from_base(parse(base), index)) == spec


def test_states_through_renamings() -> None:
    assert carried({"m": 0, "k": 2, "n": 1, "R": "R", "G": "G"}, {0: 1, 1: 0}) == {
        "m": 1, "k": "R", "n": 0, "R": "R", "G": "G"}


def test_an_operand_on_its_base_leaves_out_what_it_lacks() -> None:
    context = annotated(lambda x: F.relu(x.view(2, 3, 4).split(1)[1].transpose(1, 2)), torch.randn(6, 4))
    (op,) = context.segmented.ops
    (operand,) = op.operands
    on_base = based(context.segmented.factored, operand)
    assert operand.keys == ("o1", "o2")
    assert (on_base.node.name, on_base.keys) == ("inputs_0", ("", "o2", "o1"))
