"""Budgets on a GPU: none overshot, and the loss and gradients of the step without one, dropout on."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import autopar
from autopar.codegen.surrounding import WORK_BYTES
from autopar.core.errors import Infeasible
from tests.test_exactness import whole

pytestmark = pytest.mark.gpu
ROUNDING = 4 * 2**20
"""Bytes of blocks that the allocator does not split, where a rest of less than 1 MiB would be left: no plan knows them.
"""
PLENTY = 1e15
"""A budget that does not bind, in bytes."""
CLOSE = 2e-2
"""The relative difference in gradients allowed in 16 bits."""


def model(layers: int = 6) -> Any:
    """A GPT-2 on the GPU, large enough that activations are most of what it takes."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=512, n_head=8, vocab_size=8192, use_cache=False)
    with torch.device("cuda"):
        return GPT2LMHeadModel(config).train()


def step(budget: float | None) -> tuple[float, dict[str, Tensor], int, Any]:
    """(loss, gradients, peak bytes, plan) of a second step, of which the optimizer updates nothing."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    tokens = torch.arange(8 * 1024, device="cuda").reshape(8, 1024) % 8192
    batch = {"input_ids": tokens, "labels": tokens}
    torch.manual_seed(5)
    made: Any = autopar.compile(model(), inputs=batch, batch="global", memory_budget=budget)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    made(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    loss = made(**batch).loss
    loss.backward()
    optimizer.step()
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated() - before
    gradients = {name: whole(p.grad).detach().float().cpu() for name, p in made.named_parameters()}
    return float(loss.detach()), gradients, held, made.plan


def least_bytes() -> float:
    """The least budget, as a budget of nothing is told; what the error holds of the step is let go."""
    with pytest.raises(Infeasible) as refused:
        step(1.0)
    assert refused.value.least_budget_bytes is not None
    return refused.value.least_budget_bytes


def test_budgets_are_kept_and_change_nothing() -> None:
    autopar.init()
    loss, expected, peak, plan = step(PLENTY)
    least = least_bytes()
    for share in (0.0, 0.5, 0.9):
        budget = least + share * (plan.memory.device - least) + 1.0
        other, gradients, held, within = step(budget)
        assert within.checkpoints and within.memory.device <= budget
        assert held <= budget - within.memory.around + WORK_BYTES + ROUNDING and held <= peak + ROUNDING
        assert other == pytest.approx(loss, rel=1e-3)
        for name, gradient in gradients.items():
            assert float((gradient - expected[name]).norm()) <= CLOSE * float(expected[name].norm()), name
