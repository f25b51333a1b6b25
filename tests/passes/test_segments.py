"""Segments: runs of one block, and which of them are equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.core.errors import CaptureError
from autopar.models.resnet import ResNet, ResNetConfig
from autopar.passes.capture import capture
from autopar.passes.segments import Segmented, annotate
from tests import builders
from tests.programs import model_context, prepared, program


def classes(found: Segmented) -> list[tuple[str, int]]:
    return [(segment.name, segment.class_id) for segment in found.segments]


def annotated(model: nn.Module, *inputs: Tensor) -> Segmented:
    return annotate(prepared(capture(model, (inputs, {}))))


@pytest.mark.parametrize("layers", [1, 3])
def test_the_layers_of_gpt2_are_one_class(layers: int) -> None:
    case = builders.gpt2(layers=layers)
    found = annotate(prepared(capture(case.model, ((), case.inputs))))  # type: ignore[arg-type]
    names = [segment.name for segment in found.segments]
    assert names == ["between_0", *(f"transformer_h_{i}" for i in range(layers)), f"between_{layers + 1}"]
    assert [segment.class_id for segment in found.segments] == [0, *[1] * layers, 2]
    assert [segment.name for segment in found.representatives.values()] == [names[0], names[1], names[-1]]


def test_the_bottlenecks_of_a_resnet() -> None:
    case = builders.Case(ResNet(ResNetConfig((1, 3, 1, 1), width=8, classes=8)), (torch.randn(4, 3, 32, 32),))
    found = dict(classes(annotated(case.model, *case.inputs)))
    layers = {name: class_id for name, class_id in found.items() if name.startswith("layer")}
    assert list(layers) == ["layer1_0", "layer2_0", "layer2_1", "layer2_2", "layer3_0", "layer4_0"]
    assert layers["layer2_1"] == layers["layer2_2"]
    assert len(set(layers.values())) == 5


class Layers(nn.Module):
    """A scale and layers one after another."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.scale, self.h = nn.Parameter(torch.ones(4)), nn.ModuleList(layers)

    def forward(self, t: Tensor) -> Tensor:
        t = t * self.scale
        for layer in self.h:
            t = layer(t)
        return t


class Residual(nn.Sequential):
    """Adds its input, so that every layer's dims are those of the model's input."""

    def forward(self, t: Tensor) -> Tensor:
        return t + super().forward(t)


def block(eps: float = 1e-5, bias: bool = True, outer: int = 4) -> nn.Module:
    return Residual(nn.Linear(4, outer, bias=bias), nn.GELU(), nn.Linear(outer, 4), nn.LayerNorm(4, eps=eps))


def frozen() -> nn.Module:
    layer = block()
    layer[0].requires_grad_(False)
    return layer


@pytest.mark.parametrize(("layers", "expected"), [
    ([block(), block(), block()], [1, 1, 1]),
    ([block(), block(bias=False), block()], [1, 2, 1]),
    ([block(), block(eps=1e-3), block()], [1, 2, 1]),
    ([block(), block(outer=8), block()], [1, 2, 1]),
    ([block(), frozen(), block()], [1, 2, 1]),
    ([Residual(nn.Softmax(d)) for d in (-1, 0, -1)], [1, 2, 1]),
    ([block()] * 2, [1, 1]),
], ids=["alike", "without bias", "another eps", "wider", "frozen", "another dim", "the same one twice"])
def test_equal_layers(layers: list[nn.Module], expected: list[int]) -> None:
    found = classes(annotated(Layers(*layers), torch.randn(4, 4)))
    assert found == [("between_0", 0), *((f"h_{i}", class_id) for i, class_id in enumerate(expected))]


def test_segments_partition_the_ops_and_read_what_others_make() -> None:
    for name in ("mlp", "gpt2", "resnet"):
        found = model_context(name).segmented
        assert [i for segment in found.segments for i in segment.ops] == list(range(len(found.ops)))
        made = found.producer()
        for segment in found.segments:
            bases = {found.factored.base(node)[0] for node in segment.externals}
            assert all(base.op == "placeholder" or made[base] < segment.first for base in bases)


def test_random_ops_that_cannot_be_replayed_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"calls aten.randn_like.default.*torch.rand or dropout"):
        annotate(program(lambda t: t + torch.randn_like(t), torch.randn(3)))
