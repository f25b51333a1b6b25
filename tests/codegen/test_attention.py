"""Attention with dropout by fused kernels, against its formula under the mask that the kernel drew."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autopar.api import arguments
from autopar.codegen.attention import KernelAttention, fits
from autopar.codegen.executable import build, offline
from autopar.codegen.lower import Target
from autopar.codegen.site import Draws
from autopar.codegen.substitute import Attention
from autopar.core.cluster import Cluster
from autopar.passes.capture import Precision, capture
from autopar.planner import Request, decision_of, prepare, solve
from tests.builders import gpt2

BATCH, HEADS, WIDTH, RATE = 2, 3, 64, 0.25
MASKS = {"none": None, "padded": (BATCH, 1, 1, WIDTH), "added": (1, HEADS, WIDTH, WIDTH)}
SEED = torch.tensor(2**40 + 7)


def made(mask: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key and value with as many keys as the heads are wide, and a mask."""
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (BATCH, HEADS, WIDTH, WIDTH)
    query, key, value = (torch.randn(shape, device="cuda", generator=generator).bfloat16().requires_grad_()
                         for _ in range(3))
    if mask == "padded":
        return query, key, value, (torch.arange(WIDTH, device="cuda") < 50).expand(MASKS[mask] or ())
    if mask == "added":
        return query, key, value, torch.randn(MASKS[mask] or (), device="cuda", generator=generator).bfloat16()
    return query, key, value, None


def by_formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, keep: Tensor) -> Tensor:
    """Attention in fp32 whose weights are dropped where `keep` is false."""
    scores = query.float() @ key.float().transpose(-2, -1) / math.sqrt(WIDTH)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return torch.where(keep, scores.softmax(-1) / (1.0 - RATE), 0.0) @ value.float()


@pytest.mark.gpu
@pytest.mark.parametrize(("mask", "causal"), [("none", False), ("none", True), ("padded", False), ("added", False)])
def test_result_and_gradients_are_the_formulas_under_the_drawn_mask(mask: str, causal: bool) -> None:
    query, key, value, hidden = made(mask)
    attend = KernelAttention(shard=3, salt=5)
    identity = torch.eye(WIDTH, device="cuda", dtype=torch.bfloat16).expand_as(value)
    keep = attend(query, key, identity, hidden, RATE, causal, host_seed=SEED).detach() != 0.0
    out = attend(query, key, value, hidden, RATE, causal, host_seed=SEED)
    expected = by_formula(query, key, value, hidden, causal, keep)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    weight = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), weight)
    for gradient, other in zip(found, torch.autograd.grad(expected, (query, key, value), weight.float()), strict=True):
        torch.testing.assert_close(gradient.float(), other.float(), rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
def test_masks_depend_on_seed_and_shard_and_leave_the_users_generator_alone() -> None:
    query, key, value, _ = made("none")
    torch.manual_seed(9)
    before = torch.rand(4, device="cuda")
    torch.manual_seed(9)
    first = KernelAttention(0, 1)(query, key, value, None, RATE, host_seed=SEED)
    assert torch.equal(torch.rand(4, device="cuda"), before)
    assert torch.equal(first, KernelAttention(0, 1)(query, key, value, None, RATE, host_seed=SEED))
    others = [KernelAttention(1, 1)(query, key, value, None, RATE, host_seed=SEED),
              KernelAttention(0, 2)(query, key, value, None, RATE, host_seed=SEED),
              KernelAttention(0, 1)(query, key, value, None, RATE, host_seed=SEED + 1)]
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.gpu
def test_a_share_of_the_weights_is_dropped() -> None:
    query, key, value, _ = made("none")
    identity = torch.eye(WIDTH, device="cuda", dtype=torch.bfloat16).expand_as(value)
    kept = [(KernelAttention(0, salt)(query, key, identity, None, RATE, host_seed=SEED) != 0).float().mean()
            for salt in range(20)]
    assert float(torch.stack(kept).mean()) == pytest.approx(1.0 - RATE, abs=5e-3)


@pytest.mark.parametrize(("dtype", "width", "keys", "masked", "fit"), [
    (torch.bfloat16, 64, 64, False, True), (torch.float16, 64, 60, False, True), (torch.bfloat16, 64, 60, True, False),
    (torch.float32, 64, 64, False, False), (torch.bfloat16, 60, 64, False, False),
    (torch.bfloat16, 512, 64, False, False)])
def test_what_kernels_take(dtype: torch.dtype, width: int, keys: int, masked: bool, fit: bool) -> None:
    query = torch.empty(1, 1, 64, width, dtype=dtype)
    assert fits(query, query, torch.empty(1, 1, 64, keys) if masked else None) == fit


@pytest.mark.parametrize(("draws", "precision", "by_kernel"), [
    ("by kernel", "bf16-mixed", True), ("by element", "bf16-mixed", False), ("by kernel", "fp32", False)])
def test_kernels_are_used_where_they_are_asked_for_and_fit(draws: Draws, precision: Precision, by_kernel: bool) -> None:
    case = gpt2(dropout=0.1)
    context = prepare(capture(case.model, arguments(case.inputs), precision, case.loss_fn))
    cluster = Cluster.preset("cpu:2")
    decision = decision_of(solve(context, cluster, Request("gpt2", "ddp"))[0], context)
    price = cluster.pricer(decision.mesh)
    made = build(Target(decision, offline(decision.mesh), price, torch.device("cpu"), draws=draws))
    layers = [call.lowered for call in made.calls if any(isinstance(m, (Attention, KernelAttention))
                                                         for m in call.lowered.module.children())]
    assert len(layers) == 2 and all(lowered.host_seeded == by_kernel for lowered in layers)
    assert not any(call.lowered.host_seeded for call in made.calls if call.lowered not in layers)
