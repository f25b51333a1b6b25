"""Rows looked up at places that are known: those a table has, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.core.errors import AutoparError
from autopar.passes.capture import capture
from autopar.passes.lookups import checked
from autopar.planner import prepare


class Positions(nn.Module):
    """Adds what is looked up at 0, 1, 2, ... + `first`."""

    def __init__(self, rows: int, first: int) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(rows, 4), first

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device) + self.first
        total: Tensor = (x + self.table(places)).sum()
        return total


@pytest.mark.parametrize(("rows", "first", "length"), [(8, 0, 8), (8, 2, 6), (9, 0, 1), (1, 0, 1)])
def test_rows_that_are_there(rows: int, first: int, length: int) -> None:
    context = prepare(capture(Positions(rows, first), ((torch.ones(2, length, 4),), {})))
    assert checked(context) is context


@pytest.mark.parametrize(("rows", "first", "length", "said"), [
    (8, 0, 9, "table looks up row 8, it has rows 0 to 7: the inputs are longer"), (8, 2, 7, "looks up row 8"),
    (8, -1, 3, "table looks up row -1"),
])
def test_rows_that_are_not(rows: int, first: int, length: int, said: str) -> None:
    context = prepare(capture(Positions(rows, first), ((torch.ones(2, length, 4),), {})))
    with pytest.raises(AutoparError, match=said):
        checked(context)
