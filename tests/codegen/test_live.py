"""Bytes that are alive, op by op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopar.codegen.live import Live

ROWS = 1024
VECTOR = 4 * ROWS


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_storage_counts_while_it_is_referred_to(device: str) -> None:
    with Live(device) as live:
        x = torch.ones(ROWS, device=device)
        view = x[:10]
        assert live.bytes == VECTOR
        del x
        y = torch.ones(ROWS, device=device)
        assert live.bytes == 2 * VECTOR
        del view
        live.restart()
        assert live.bytes == live.peak == VECTOR
        y.add_(y)
        assert live.peak == VECTOR


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_autograd_saves_is_alive_until_the_backward(device: str) -> None:
    x = torch.ones(ROWS, device=device, requires_grad=True)
    with Live(device) as live:
        live.hold([x])
        y = x.exp().sin().sum()
        saved = live.bytes
        y.backward()  # type: ignore[no-untyped-call]
        del y
        live.restart()
    assert saved == 2 * VECTOR + 4  # exp's result is what both save, the loss
    assert live.bytes == 2 * VECTOR  # x and its gradient


def test_memory_that_is_given_up_counts_no_longer() -> None:
    with Live("cpu") as live:
        x: Tensor = torch.ones(ROWS)
        x.untyped_storage().resize_(0)
        live.restart()
    assert live.bytes == 0
