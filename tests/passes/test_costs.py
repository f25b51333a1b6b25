"""Roofline costs against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autopar.core.device import Device, Flops
from autopar.core.errors import UnknownName
from autopar.passes.costs import OPTIMIZERS, Work, optimizer_called, slowest, work_of
from autopar.passes.rules.nodes import shape, tensor_operands
from tests.programs import annotated

FAST = Device("fast", Flops(1e12, 4e12, 2e12), 0.5, 1e10, 1e11, 1e-5)


def t(*sizes: int) -> Tensor:
    return torch.randn(sizes)


def work(call: Callable[..., Tensor], *operands: Tensor) -> Work:
    """Of the last op, whole on one device."""
    op = annotated(call, *operands).segmented.ops[-1]
    return work_of(op.main, [shape(n) for n in tensor_operands(op.main)], shape(op.main), 8.0, torch.float32)


@pytest.mark.parametrize(("call", "operands", "flop"), [
    (F.linear, (t(5, 3), t(7, 3)), 2 * 5 * 3 * 7),
    (F.linear, (t(2, 5, 3), t(7, 3), t(7)), 2 * 10 * 3 * 7),
    (torch.mm, (t(5, 3), t(3, 7)), 2 * 5 * 3 * 7),
    (torch.bmm, (t(2, 5, 3), t(2, 3, 7)), 2 * 2 * 5 * 3 * 7),
    (torch.matmul, (t(2, 4, 5, 3), t(2, 4, 3, 7)), 2 * 8 * 5 * 3 * 7),
    (torch.matmul, (t(5, 3), t(3)), 2 * 5 * 3),
    (torch.addmm, (t(7), t(5, 3), t(3, 7)), 2 * 5 * 3 * 7),
    (F.conv1d, (t(2, 3, 10), t(4, 3, 5)), 2 * 2 * 4 * 6 * 3 * 5),
    (F.conv2d, (t(2, 3, 8, 8), t(4, 3, 3, 3)), 2 * 2 * 4 * 36 * 27),
    (lambda x, w: F.conv2d(x, w, stride=2, padding=1), (t(2, 3, 8, 8), t(4, 3, 3, 3)), 2 * 2 * 4 * 16 * 27),
    (lambda x, w: F.conv2d(x, w, groups=3), (t(2, 3, 8, 8), t(6, 1, 3, 3)), 2 * 2 * 6 * 36 * 9),
    (F.relu, (t(4, 4),), 0),
    (lambda x: x.softmax(-1), (t(4, 4),), 0),
])
def test_flop(call: Callable[..., Tensor], operands: tuple[Tensor, ...], flop: float) -> None:
    found = work(call, *operands)
    assert found.flop == flop
    assert found.backward_flop == 2 * flop


def test_attention_counts_both_products_and_half_under_a_causal_mask() -> None:
    q, k, v = t(2, 4, 6, 3), t(2, 4, 8, 3), t(2, 4, 8, 5)
    found = work(F.scaled_dot_product_attention, q, k, v)
    assert found.flop == 2 * 8 * 6 * 8 * (3 + 5)
    assert found.backward_flop == 2.5 * found.flop
    causal = work(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), q)
    assert causal.flop == 8 * 6 * 6 * (3 + 3)


@pytest.mark.parametrize(("dtype", "flop", "nbytes", "forward", "backward"), [
    (torch.float32, 1e9, 1e3, 1e9 / 0.5e12 + 1e-5, 2e9 / 0.5e12 + 1e-5),
    (torch.bfloat16, 1e9, 1e3, 1e9 / 2e12 + 1e-5, 2e9 / 2e12 + 1e-5),
    (torch.float16, 1e9, 1e3, 1e9 / 1e12 + 1e-5, 2e9 / 1e12 + 1e-5),
    (torch.float64, 1e9, 1e3, 1e9 / 0.5e12 + 1e-5, 2e9 / 0.5e12 + 1e-5),
    (torch.float32, 1e3, 1e9, 1e9 / 1e11 + 1e-5, 2e9 / 1e11 + 1e-5),
])
def test_seconds_are_the_slower_of_compute_and_memory(dtype: torch.dtype, flop: float, nbytes: float, forward: float,
                                                      backward: float) -> None:
    found = Work(flop, nbytes, dtype, 2 * flop)
    assert found.forward_seconds(FAST) == pytest.approx(forward, rel=1e-12)
    assert found.backward_seconds(FAST) == pytest.approx(backward, rel=1e-12)


def test_slowest_has_the_worst_figure_in_each_respect() -> None:
    other = Device("other", Flops(2e12, 2e12, 2e12), 0.25, 3e10, 2e11, 3e-5)
    found = slowest([FAST, other, FAST])
    assert [found.matmul_flops(d) for d in ("fp32", "bf16", "fp16")] == [0.5e12, 0.5e12, 0.5e12]
    assert (found.memory_bytes, found.memory_bytes_per_s, found.launch_s) == (1e10, 1e11, 3e-5)
    assert found.kind == "slowest of fast, other"
    assert slowest([FAST, FAST]) is FAST


def test_optimizers() -> None:
    assert optimizer_called("adamw") is OPTIMIZERS["adamw"]
    assert {name: o.state_bytes for name, o in OPTIMIZERS.items()} == {"adamw": 8, "adam": 8, "sgd": 0, "momentum": 4}
    with pytest.raises(UnknownName, match="unknown optimizer 'lion'; known: adam, adamw, momentum, sgd"):
        optimizer_called("lion")
