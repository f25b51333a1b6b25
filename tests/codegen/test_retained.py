"""Segments that are cut alike share a joint graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from autopar.codegen.retained import key_of

ONE, TWO = [torch.empty(2, 3, requires_grad=True)], [torch.empty(4, 3, requires_grad=True)]


def graph(scale: float) -> fx.GraphModule:
    def run(x: Tensor) -> Tensor:
        return torch.relu(x) * scale
    return fx.symbolic_trace(run)


@pytest.mark.parametrize(("other", "same"), [
    (key_of(graph(2.0), ONE, True), True), (key_of(graph(3.0), ONE, True), False),
    (key_of(graph(2.0), TWO, True), False), (key_of(graph(2.0), [ONE[0].detach()], True), False),
    (key_of(graph(2.0), ONE, False), False),
])
def test_keys_tell_what_is_traced(other: object, same: bool) -> None:
    assert (key_of(graph(2.0), ONE, True) == other) is same


def test_what_a_graph_does_not_tell_has_none() -> None:
    assert key_of(fx.symbolic_trace(nn.Linear(3, 3)), ONE, True) is None
