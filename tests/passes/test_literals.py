"""Tensors that a forward writes out by their values, wherever it asks for them to lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autopar.passes.capture import capture
from autopar.passes.constants import FoldConstants

VALUES = [1.0, 2.0, 3.0, 4.0]
WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nowhere": lambda x: torch.tensor(VALUES),
    "beside an input": lambda x: torch.tensor(VALUES, device=x.device),
    "like an input": lambda x: x.new_tensor(VALUES),
    "as a tensor": lambda x: torch.as_tensor(VALUES),
    "beside another": lambda x: torch.tensor(VALUES) * torch.arange(4),
}


class Weighed(nn.Module):
    """Inputs times numbers that the forward writes out."""

    def __init__(self, written: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.written = nn.Linear(4, 4), written

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.written(x)).sum()


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_values_are_kept(written: Callable[[Tensor], Tensor]) -> None:
    program = capture(Weighed(written), ((torch.zeros(2, 4),), {}), "fp32")
    assert [value.tolist() for value in program.constants.values()] == [VALUES]


class Translator(nn.Module):
    """torch's own encoder and decoder, the latter under a causal mask that the forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Transformer(8, 2, 1, 1, 8, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.both(source, target, tgt_mask=mask).sum()


def test_a_mask_s_values_are_not_asked_for() -> None:
    program = FoldConstants()(capture(Translator(), ((torch.zeros(2, 4, 8), torch.zeros(2, 3, 8)), {}), "fp32"))
    assert [note.removeprefix("attention: ") for note in program.notes].count("causal") == 1
