"""What a step does, counted by hand beside what is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.passes.capture import capture
from autopar.plan import Plan
from autopar.planner import Request, prepare, solve, verify
from autopar.workload import peak_flops_per_s, workload_of
from tests.programs import model_context


class Words(nn.Module):
    """An embedding of whole numbers, one matrix behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.embed(ids)).flatten(0, 1), ids.flatten())


def test_matmuls_count_once_forward_and_twice_backward() -> None:
    ids = torch.zeros(8, 4, dtype=torch.long)
    found = workload_of(prepare(capture(Words(), ((ids,), {}), "fp32")))
    assert (found.samples, found.tokens) == (8, 32)
    assert found.flop == 3 * 2 * 32 * 16 * 32


def test_a_causal_mask_halves_attention() -> None:
    def attention(causal: bool) -> float:
        class Attend(nn.Module):
            def forward(self, q: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(q, q, q, is_causal=causal).sum()
        return workload_of(prepare(capture(Attend(), ((torch.randn(2, 4, 8, 16),), {}), "fp32"))).flop
    assert (attention(False), attention(True)) == (2 * 2 * 2 * 4 * 8 * 8 * 16, 2 * 2 * 4 * 8 * 8 * 16)


def test_images_have_no_tokens() -> None:
    assert workload_of(model_context("resnet", "bf16-mixed")).tokens is None
    assert workload_of(model_context("gpt2", "bf16-mixed")).tokens is not None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed", "fp16-mixed"])
def test_the_peak_is_that_of_all_devices_in_the_compute_dtype(precision: str) -> None:
    cluster = Cluster.preset("2x4xA100-80GB")
    peak = cluster.devices[0].peak.table()[precision.partition("-")[0]]
    assert peak_flops_per_s(cluster, precision) == 8 * peak  # type: ignore[arg-type]


def test_rates_follow_from_the_step() -> None:
    context, cluster = model_context("gpt2", "bf16-mixed"), Cluster.preset("4xA100-80GB")
    plan, _ = solve(context, cluster, Request("gpt2", "ddp"))
    assert plan.workload == workload_of(context)
    assert plan.samples_per_s * plan.step_time_s == pytest.approx(plan.workload.samples)
    assert plan.tokens_per_s is not None and plan.tokens_per_s * plan.step_time_s == pytest.approx(plan.workload.tokens)
    assert 0 < plan.mfu < 1
    parts = plan.compute_s + plan.inline_s + plan.exposed_s + plan.optimizer_s + plan.bubble_s
    assert parts == pytest.approx(plan.step_time_s) and plan.communication_s == plan.inline_s + plan.exposed_s


def test_edited_flop_are_refused() -> None:
    context, cluster = model_context("mlp", "bf16-mixed"), Cluster.preset("cpu:2")
    data = solve(context, cluster, Request("mlp", "ddp"))[0].to_json()
    data["flop"] *= 2
    with pytest.raises(AutoparError, match=r"claims .* FLOP"):
        verify(Plan.from_json(data), context, cluster)
