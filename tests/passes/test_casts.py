"""Operands in several floating dtypes meet as under autocast, and what is in float64 is told of."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopar
from autopar.passes.capture import Precision, capture
from autopar.passes.casts import Casts
from tests.pool import Pool

X = torch.randn(2, 4, 8)


class Scaled(nn.Module):
    """Layers that take what a buffer in fp32 has made wide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.up(self.norm(x * self.scale)) * self.scale
        return F.mse_loss(self.attention(x, x, x, need_weights=False)[0], y)


def trained(rank: int, world_size: int, precision: Precision) -> None:
    autopar.compile(Scaled(), "cpu:1", inputs=(X, X), precision=precision)(X, X).backward()


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16", "fp16-mixed"])
def test_a_buffer_in_fp32_trains_in_every_precision(pool: Callable[[int], Pool], precision: Precision) -> None:
    program = capture(Scaled(), ((X, X), {}), precision)
    for node in program.graph.nodes:
        if node.target in (torch.ops.aten.linear.default, torch.ops.aten.scaled_dot_product_attention.default):
            assert len({x.meta["val"].dtype for x in node.all_input_nodes if x.meta["val"].is_floating_point()}) == 1
    pool(1).run(trained, precision)


LOW, HIGH = torch.bfloat16, torch.float32
CASES: dict[str, tuple[Callable[[], Tensor], torch.dtype]] = {
    "@": (lambda: X @ torch.ones(8, 8, dtype=LOW), LOW),
    "mixed the other way": (lambda: X.to(LOW) @ torch.ones(8, 8), LOW),
    "einsum": (lambda: torch.einsum("btd,de->bte", X, torch.ones(8, 8, dtype=LOW)), LOW),
    "conv": (lambda: F.conv1d(X, torch.ones(3, 4, 1, dtype=LOW)), LOW),
    "group norm": (lambda: F.group_norm(X, 2, torch.ones(4, dtype=LOW)), HIGH),
    "one dtype": (lambda: X @ torch.ones(8, 8), HIGH), "promoted": (lambda: X + torch.ones(8, dtype=LOW), HIGH),
}


@pytest.mark.parametrize("name", CASES)
def test_casts(name: str) -> None:
    act, dtype = CASES[name]
    with Casts():
        assert act().dtype == dtype


def test_float64_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "autopar"):
        capture(Scaled().double(), ((X.double(), X), {}), "fp32")
    assert caplog.messages == ["nothing computes in float64: input 0 and 8 more in it are cast to float32 as "
                               "precision= has it; call .float() on them beforehand, which halves what they take"]
