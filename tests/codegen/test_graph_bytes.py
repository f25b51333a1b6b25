"""Kernels of compiled graphs, and the bytes that go through memory between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from autopar.codegen import private
from autopar.codegen.graph_bytes import Inputs, kernels_of, memory_of, peak, plain_peak

N = 64
MATRIX = N * N * 4


def graph(call: Callable[[Tensor], Tensor]) -> fx.Graph:
    """The forward of a call on a matrix as a compiler gets it."""
    found: dict[str, fx.GraphModule] = {}
    with private.without_values():
        private.traced(lambda x: (call(x),), [torch.empty(N, N)], found.setdefault)
    return found["forward"].graph


@pytest.mark.parametrize(("call", "stored", "bytes_"), [
    (lambda x: x.sin().cos().exp(), 1, MATRIX),  # one kernel
    (lambda x: (x @ x).sin() @ x, 3, 2 * MATRIX),  # the product, what the next one reads, and that one
    (lambda x: (x @ x).sin() + (x @ x).cos(), 3, 2 * MATRIX),  # written over a product
    (lambda x: (x - x.mean(1, keepdim=True)).exp() @ x, 2, 2 * MATRIX),  # a reduction inside of a kernel
    (lambda x: (x @ x).t().reshape(-1), 2, 2 * MATRIX),  # a copy, as rows are columns
])
def test_what_comes_to_memory(call: Callable[[Tensor], Tensor], stored: int, bytes_: int) -> None:
    made = graph(call)
    assert len(kernels_of(made, {}).stored) == stored
    given = [n for n in made.nodes if n.op == "placeholder"]
    assert peak(made, Inputs(given)) == bytes_
    assert peak(made, Inputs()) >= bytes_ + (MATRIX if stored == 3 else 0)


@pytest.mark.parametrize("most", [peak, plain_peak])
def test_views_of_one_value_are_there_once(most: Callable[[fx.Graph, Inputs, int], int]) -> None:
    made = fx.Graph()
    one, other = (made.placeholder(name) for name in ("one", "other"))
    product = made.call_function(torch.ops.aten.mm.default, (one, other))
    made.output((product,))
    x = torch.empty(N, N)
    for node, value in ((one, x), (other, x.t()), (product, torch.empty(N, N))):
        node.meta["val"] = value
    assert most(made, Inputs(), 1) == 3 * MATRIX
    assert most(made, Inputs(same={other: one}), 1) == 2 * MATRIX


def test_gradients_that_are_held_are_there_to_the_end() -> None:
    made = graph(lambda x: ((x @ x) @ x) @ x)
    given = [n for n in made.nodes if n.op == "placeholder"]
    assert peak(made, Inputs(lasting=given), 1) == peak(made, Inputs(given), 1) + MATRIX


def test_results_of_one_op_are_memory_of_their_own() -> None:
    made = graph(lambda x: torch.topk(x, 8)[0].t() @ torch.cat(x.split(N // 2)[::-1]))
    by_name = {node.name: node for node in made.nodes}
    assert memory_of(by_name["permute"]) is by_name["getitem"]
