"""Which programs take samples that count for nothing, and how they are marked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autopar.api import arguments
from autopar.passes.additive import additive
from autopar.passes.capture import capture
from autopar.planner import prepare
from tests.families import SEEN, family

MIXED = {"resnet": "batch_norm"}
"""Families whose samples can't be added to, and the op that is named as the reason."""


@pytest.mark.parametrize("name", SEEN)
def test_which_families_take_samples_that_count_for_nothing(name: str) -> None:
    case = family(name)
    found = additive(prepare(capture(case.model, arguments(case.inputs), "fp32", case.loss_fn)))
    assert MIXED.get(name, "") in found.obstacle and bool(found.obstacle) == (name in MIXED)
    assert {node.name: mark for node, mark in found.marks.items()} == ({} if name in MIXED else {"labels": -100})


class Looked(nn.Module):
    """Targets are looked up in a table too, where no ignored one may stand."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.table(tokens)).flatten(0, 1), tokens.flatten())


class Spread(nn.Module):
    """A term that compares samples beside the cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = self.head(x)
        return nn.functional.cross_entropy(out, y) + (out @ out.t()).square().mean()


TOKENS, X, Y = torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 4), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(("model", "inputs", "loss_fn", "reason"), [
    (Looked(), (TOKENS,), None, "tokens is read by table (embedding.default) besides the loss"),
    (Spread(), (X, Y), None, "mixes samples"),
    (nn.Linear(4, 4), (X, X), nn.functional.mse_loss, "mixes samples"),
    (nn.Linear(4, 4), (X, X), nn.functional.cross_entropy, "mixes samples"),
    (nn.Linear(4, 4), (X, Y), lambda out, y: nn.functional.cross_entropy(out, y, reduction="sum") / 4, "mixes samples"),
    (nn.Linear(4, 4), (X, Y), lambda out, y: nn.functional.cross_entropy(out, y) + out.trace(), "may mix samples"),
])
def test_programs_that_take_none(model: nn.Module, inputs: Any, loss_fn: Any, reason: str) -> None:
    obstacle = additive(prepare(capture(model, (inputs, {}), "fp32", loss_fn))).obstacle
    assert obstacle.endswith(reason), obstacle
