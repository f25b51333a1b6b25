"""Joint graphs read as values that can be kept, and cut where a plan keeps them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from autopar.codegen import private
from autopar.codegen.joint import Cut, Joint, joint
from autopar.codegen.marks import MARK


def block(x: Tensor, scale: Tensor, wide: Tensor, narrow: Tensor) -> Tensor:
    """A norm, two matmuls with an activation between, a residual, marked."""
    y = MARK(F.layer_norm(x, (8,), scale), "0.0")
    h = MARK(y @ wide, "1.0")
    g = MARK(F.gelu(h), "2.0")
    return MARK(x + MARK(g @ narrow, "3.0"), "4.0")


SHAPES = {"x": (4, 8), "scale": (8,), "wide": (8, 32), "narrow": (32, 8)}


def traced(fused: bool = False) -> Joint:
    """The joint graph of `block`."""
    with private.without_values():
        inputs = [torch.empty(shape, requires_grad=True) for shape in SHAPES.values()]
        found = private.joint_graph(fx.symbolic_trace(block), inputs, fused)
    assert found is not None
    return joint(*found)


def names(graph: Joint, kept: set[str]) -> list[str]:
    """What is saved besides inputs, in order."""
    return sorted(graph.names[node] for node in graph.saved(frozenset(kept)) if node.op != "placeholder")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kept", "saved"), [
    ({"0.0", "0.0+", "1.0", "2.0", "3.0", "4.0"}, ["0.0", "0.0+", "0.0+", "1.0", "2.0"]),
    ({"1.0"}, ["1.0"]), ({"2.0"}, ["2.0"]), (set(), []), ({"3.0", "4.0"}, []),
])
def test_what_is_kept_is_what_is_needed_of_it(fused: bool, kept: set[str], saved: list[str]) -> None:
    assert names(traced(fused), kept) == saved


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_cut_leaves_the_joint_graph_as_it_is_and_says_nothing() -> None:
    graph = traced().module
    before = [(node.name, node.target) for node in graph.graph.nodes]
    forward, _ = private.cut_by_compiler(graph, 1)
    assert len(forward.graph.find_nodes(op="placeholder")) == len(SHAPES)
    assert [(node.name, node.target) for node in graph.graph.nodes] == before


def test_marks_are_gone() -> None:
    assert not traced().module.graph.find_nodes(op="call_function", target=MARK)


@pytest.mark.parametrize("kept", [(), ("1.0",), ("0.0", "0.0+", "1.0", "2.0")], ids=str)
def test_gradients_are_the_same(kept: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in SHAPES.values()]
    expected = torch.autograd.grad(plain(*inputs).square().sum(), inputs)
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        out = private.partitioned(block, Cut(kept))(*inputs)
    found = torch.autograd.grad(out.square().sum(), inputs)
    assert sum(x.shape == (4, 32) for x in held) == sum(name in ("1.0", "2.0") for name in kept)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def plain(x: Tensor, scale: Tensor, wide: Tensor, narrow: Tensor) -> Tensor:
    """`block` without marks."""
    return x + F.gelu(F.layer_norm(x, (8,), scale) @ wide) @ narrow
