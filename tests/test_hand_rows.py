"""Training by hand, which benchmarks compare with, is right itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, use_cache=False))


IDS = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(1))


def cut(rank: int, world_size: int) -> tuple[float, Tensor]:
    """Loss and the gradient of a projection of the model cut by hand."""
    sys.path.insert(0, BENCHMARKS)
    from hand import Job
    from hand_tensor import tensor

    ids = IDS.chunk(world_size)[rank]
    job = Job(llama(), ("model.layers.0", "model.layers.1"), {"input_ids": ids, "labels": ids},
              lambda model, batch: model(**batch).loss)
    with torch._dynamo.config.patch(disable=True):  # blocks as they are
        loss = job.loss(tensor(job), job.batch)
        loss.backward()
    return loss.item(), job.model.model.layers[0].self_attn.k_proj.weight.grad.full_tensor()


@pytest.mark.dist
def test_tensor_parallelism_by_hand(pool: Any) -> None:
    plain = llama()
    loss = plain(input_ids=IDS, labels=IDS).loss
    loss.backward()
    for mine, gradient in pool(2).run(cut):
        assert mine == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(gradient, plain.model.layers[0].self_attn.k_proj.weight.grad, rtol=1e-4, atol=1e-6)
