"""Layer dropout while a model is traced: at the rates 0 and 1 nothing is drawn for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.core.errors import AutoparError
from autopar.passes.capture import capture
from autopar.passes.certain import CertainComparisons


class Dropping(nn.Module):
    """Two layers, each left out at a rate while training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.layers, self.rate = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), rate

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training:
                drawn = torch.rand([])
                if drawn < self.rate:
                    continue
            x = layer(x)
        return x.sum()


@pytest.mark.parametrize(("rate", "layers"), [(0.0, 2), (0, 2), (1.0, 0), (1.5, 0), (-0.5, 2)])
def test_rates_that_leave_nothing_to_chance(rate: float, layers: int) -> None:
    program = capture(Dropping(rate), ((torch.zeros(2, 4),), {}), "fp32")
    assert sum(node.target == torch.ops.aten.linear.default for node in program.graph.nodes) == layers


def test_a_rate_in_between_is_refused() -> None:
    with pytest.raises(AutoparError):
        capture(Dropping(0.5), ((torch.zeros(2, 4),), {}), "fp32")


@pytest.mark.parametrize("bound", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_answers_are_those_of_numbers_that_are_drawn(bound: float) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        with CertainComparisons():
            drawn = torch.rand([])
            found = bool(drawn < bound), bool(drawn >= bound), bool(torch.lt(drawn, bound)), bool(drawn.ge(bound))
        assert found == (float(drawn) < bound, float(drawn) >= bound, float(drawn) < bound, float(drawn) >= bound)
        assert torch.equal(torch.rand([2]) < bound, torch.zeros(2, dtype=torch.bool)) or bound > 0.0
