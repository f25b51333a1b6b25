"""Layers outside of transformers and ResNets, on real ranks: no op runs replicated, loss and gradients are the plain
model's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import autopar
from autopar.api import arguments
from autopar.core.errors import CaptureError
from autopar.core.mesh import Mesh
from autopar.passes.capture import capture
from autopar.passes.segments import annotate
from autopar.planner import Request, prepare, solve, verify
from tests.builders import Case, quick
from tests.test_exactness import TOLERANCE, gradient_errors


class UNet(nn.Module):
    """Group norms, strided and transposed convolutions, resampling, a loss of images."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 16, 3, 2, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.up = nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.out = parametrizations.weight_norm(nn.Conv2d(12, 4, 3, padding="same"))

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        low = F.silu(self.norm(self.down(image)))
        smooth = F.interpolate(low.std(1, keepdim=True), scale_factor=2, mode="bilinear")
        made = self.out(torch.cat((self.up(low) + smooth, image), 1))
        return F.smooth_l1_loss(made, target)


class Tagger(nn.Module):
    """Recurrent layers over embedded words, tags by log-likelihood with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(32, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(16, 16)
        self.norm = nn.RMSNorm(16)
        self.tags = nn.Linear(16, 8)

    def forward(self, words: Tensor, tags: Tensor) -> Tensor:
        hidden, (last, _) = self.lstm(self.words(words))
        hidden, _ = self.gru(hidden.transpose(0, 1) + last.unbind(0)[0].repeat(1, 2))
        best = self.norm(hidden.transpose(0, 1)).sort(1)[0]
        return F.nll_loss(F.log_softmax(self.tags(best), -1).transpose(1, 2), tags, ignore_index=0)


def unet() -> Case:
    torch.manual_seed(0)
    return Case(UNet(), (torch.randn(8, 4, 16, 16), torch.randn(8, 4, 16, 16)))


def tagger() -> Case:
    torch.manual_seed(0)
    words, tags = torch.randint(0, 32, (8, 6)), torch.randint(1, 8, (8, 6))
    tags[:5, 2:] = 0
    return Case(Tagger(), (words, tags))


MODELS: dict[str, Callable[[], Case]] = {"unet": unet, "tagger": tagger}


def check(rank: int, world_size: int, name: str, options: dict[str, Any]) -> tuple[float, float, tuple[str, ...]]:
    """(loss error, worst gradient error, ops that ran replicated) of one step."""
    case = MODELS[name]()
    reference = copy.deepcopy(case.model)
    expected = reference(*case.inputs)
    expected.backward()
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, precision="fp32", **options)
    loss = model(*case.inputs)
    loss.backward()
    return abs(float(loss) - float(expected)), max(gradient_errors(model, reference).values()), model.plan.fallback_ops


@pytest.mark.dist
@pytest.mark.parametrize("mode", ["ddp", "zero3", "1d", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_layers(pool: Any, name: str, mode: str) -> None:
    for loss_error, gradient_error, replicated in pool(2).run(check, name, {"mode": mode}):
        assert loss_error <= TOLERANCE
        assert gradient_error <= TOLERANCE
        assert replicated == ()


@pytest.mark.parametrize(("mode", "mesh"), [("auto", (2, 2)), ("1d", (2,))], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_their_plans_verify(name: str, mode: str, mesh: tuple[int, ...]) -> None:
    case, cluster = MODELS[name](), quick(Mesh(mesh).size)
    context = prepare(capture(case.model, arguments(case.inputs), "bf16-mixed"))
    plan, _ = solve(context, cluster, Request(name, mode, mesh))
    assert verify(plan, context, cluster) == pytest.approx((plan.seconds.step, plan.memory.total), rel=1e-6)


class Encoded(nn.Module):
    """The mean of what a recurrent layer makes."""

    def __init__(self, encoder: nn.RNNBase) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, t: Tensor) -> Tensor:
        made: Tensor = self.encoder(t)[0]
        return made.mean()


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_dropout_inside_of_a_recurrent_layer_is_refused_with_what_to_do(layer: type[nn.RNNBase]) -> None:
    model, inputs = Encoded(layer(4, 4, 2, dropout=0.3)), ((torch.randn(3, 4, 4),), dict[str, Any]())
    with pytest.raises(CaptureError, match=r"^encoder .* drops out 0\.3 .* give it dropout=0"):
        prepare(capture(model, inputs, "fp32"))
    annotate(capture(model.eval(), inputs, "fp32"))
    prepare(capture(Encoded(layer(4, 4, 1)), inputs, "fp32"))


def test_recurrent_layers_are_traced_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(tagger().model, arguments(tagger().inputs), "fp32")
