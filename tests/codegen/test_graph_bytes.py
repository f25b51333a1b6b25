"""Kernels of compiled graphs, and the bytes that go through memory between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from autopar.codegen import private
from autopar.codegen.graph_bytes import kernels_of, peak

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
    assert len(kernels_of(made).stored) == stored
    given = [n for n in made.nodes if n.op == "placeholder"]
    assert peak(made, given) == bytes_
    assert peak(made, []) >= bytes_ + (MATRIX if stored == 3 else 0)
