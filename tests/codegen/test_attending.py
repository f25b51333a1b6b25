"""Attention kernels are chosen by time, on a rank's own shapes, with keys and values in groups where that wins."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from autopar.codegen.attending import Scores, Way, attentions, chosen, in_groups, quickest, timed
from autopar.codegen.executable import Executable, build, offline
from autopar.codegen.lower import Target
from autopar.codegen.private import ATTENTION
from autopar.core.mesh import Mesh
from autopar.passes.capture import Precision, capture
from autopar.planner import Request, decision_of, prepare, solve
from tests.builders import quick

CUDNN, FLASH, EFFICIENT, MATH = ATTENTION
SCORES = Scores((2, 4, 16, 8), (2, 2, 16, 8), (2, 2, 16, 8), torch.bfloat16, causal=True)


class Grouped(nn.Module):
    """Attention of four heads whose keys and values two groups share, and that of another kind, masked."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(64, 128)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.into(x).unflatten(-1, (8, 16)).transpose(1, 2).split([4, 2, 2], 1)
        shared = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return (shared + F.scaled_dot_product_attention(query, query, query, mask)).square().mean()


INPUTS = {"x": torch.randn(4, 16, 64), "mask": torch.ones(4, 1, 1, 16, dtype=torch.bool)}


@cache
def lowered(mode: str, precision: Precision) -> Executable:
    context = prepare(capture(Grouped(), ((), INPUTS), precision))
    where = quick(2)
    decision = decision_of(solve(context, where, Request("Grouped", mode, (2,)))[0], context)
    return build(Target(decision, offline(decision.mesh), where.pricer(Mesh((2,))), torch.device("cpu")))


@pytest.mark.parametrize(("seconds", "best"), [
    ({CUDNN: 1.0, FLASH: 2.0, EFFICIENT: 3.0}, Way(CUDNN)),
    ({CUDNN: 1.0, FLASH: 0.9, EFFICIENT: 3.0}, Way(FLASH)),
    ({CUDNN: 1.0, FLASH: 0.98, EFFICIENT: 3.0}, Way(CUDNN)),
    ({CUDNN: math.inf, FLASH: 2.0, EFFICIENT: 1.0}, Way(EFFICIENT)),
    ({CUDNN: math.inf, FLASH: 2.0, EFFICIENT: math.inf}, Way(FLASH)),
    ({CUDNN: math.inf, FLASH: math.inf, EFFICIENT: math.inf}, Way(CUDNN)),
])
@pytest.mark.parametrize("in_groups", [0.5, 2.0])
def test_the_quickest_by_more_than_noise(seconds: dict[SDPBackend, float], best: Way, in_groups: float) -> None:
    way = quickest(SCORES, lambda _, way: seconds[way.kernel] * (in_groups if way.groups else 1.0))
    assert way.kernel is best.kernel or in_groups < 1
    assert way.groups == (in_groups < 1 and min(seconds.values()) < math.inf)


def test_shapes_are_those_of_a_rank() -> None:
    executable = lowered("ddp", "bf16")
    (call,) = executable.calls
    shared, masked = attentions(call.lowered.module, executable.decision).values()
    assert shared == Scores((2, 4, 16, 16), (2, 2, 16, 16), (2, 2, 16, 16), torch.bfloat16, causal=True)
    assert masked == Scores(*((2, 4, 16, 16),) * 3, torch.bfloat16, causal=False, mask=(2, 1, 1, 16))


def test_32_bits_have_no_choice() -> None:
    executable = lowered("ddp", "fp32")
    (call,) = executable.calls
    assert chosen(call.lowered.module, executable.decision, lambda *_: 1.0).module is call.lowered.module


def test_groups_give_the_same() -> None:
    executable = lowered("ddp", "bf16")
    (call,) = executable.calls
    module = call.lowered.module
    choice = chosen(module, executable.decision, lambda _, way: 1.0 - way.groups / 2 - (way.kernel is FLASH) / 4)
    assert choice.order == (FLASH, CUDNN, EFFICIENT, MATH)
    attending = [n for n in choice.module.graph.nodes if n in attentions(choice.module, executable.decision)]
    assert [n.kwargs.get("enable_gqa") for n in attending] == [True, None]
    assert len(choice.module.graph.nodes) < len(module.graph.nodes), "nothing is repeated"
    assert in_groups(module, []).code == module.code
    given = [_given(n.name) for n in module.graph.nodes if n.op == "placeholder"]
    assert torch.equal(choice.module(*given)[0], module(*given)[0])


def _given(name: str) -> Tensor:
    known = {"x": INPUTS["x"].bfloat16(), "mask": INPUTS["mask"], "seed": torch.zeros((), dtype=torch.int64)}
    shape = (128, 64) if "weight" in name else (128,)
    return known.get(name, torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).bfloat16())


@pytest.mark.gpu
def test_a_kernel_is_found_on_this_gpu() -> None:
    long = Scores((2, 8, 1024, 64), (2, 2, 1024, 64), (2, 2, 1024, 64), torch.bfloat16, causal=True)
    assert math.isfinite(timed(long, quickest(long, timed)))
    refused = Scores((1, 2, 64, 1000), (1, 2, 64, 1000), (1, 2, 64, 1000), torch.bfloat16, causal=False)
    assert timed(refused, Way(FLASH)) == math.inf
