"""Layers: norms, convolutions, pooling, resampling, bags of embeddings, recurrent layers, composites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.rules.cases import Operand, case, i, w, x

aten = torch.ops.aten


def norm_cases() -> Iterator[Any]:
    group, instance, weight = aten.group_norm.default, aten.instance_norm.default, aten._weight_norm.default
    yield case("group_norm", "n", group, lambda t, *o: F.group_norm(t, 2, *o), x(4, 4, 3), w(4), w(4))
    yield case("group_norm plain", "n", group, lambda t: F.group_norm(t, 2), x(4, 4, 4, 4))
    yield case("instance_norm", "n c", instance, lambda t, *o: F.instance_norm(t, None, None, *o), x(4, 4, 5), w(4),
               w(4))
    yield case("instance_norm plain", "n c", instance, F.instance_norm, x(4, 4, 4, 4))
    yield case("rms_norm", "e0 e1", aten.rms_norm.default, lambda t, v: F.rms_norm(t, (8,), v), x(4, 4, 8), w(8))
    yield case("rms_norm plain", "e0", aten.rms_norm.default, lambda t: F.rms_norm(t, (4, 8)), x(4, 4, 8))
    yield case("weight_norm", "o0", weight, lambda v, g: torch._weight_norm(v, g, 0), w(4, 3), w(4, 1))
    yield case("weight_norm behind", "o1", weight, lambda v, g: torch._weight_norm(v, g, 1), w(3, 4, 2), w(1, 4, 1))
    yield case("prelu", "o0 o1 o2", aten.prelu.default, F.prelu, x(4, 4, 4), w(4))
    yield case("prelu of one slope", "o0 o1", aten.prelu.default, F.prelu, x(4, 4), w(1))


def convolution_cases() -> Iterator[Any]:
    one, two, three = aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input
    yield case("conv_transpose1d", "n c o", one, F.conv_transpose1d, x(4, 4, 5), w(4, 4, 3))
    yield case("conv_transpose2d", "n c o", two, lambda *o: F.conv_transpose2d(*o, stride=2, padding=1), x(4, 4, 4, 4),
               w(4, 8, 3, 3), w(8))
    yield case("conv_transpose2d in groups", "n", two, lambda *o: F.conv_transpose2d(*o, groups=2), x(4, 4, 4, 4),
               w(4, 2, 3, 3), w(4))
    yield case("conv_transpose3d", "n c o", three, F.conv_transpose3d, x(4, 4, 2, 2, 2), w(4, 4, 2, 2, 2))
    yield case("conv3d", "n c o", aten.conv3d.default, F.conv3d, x(4, 4, 3, 3, 3), w(4, 4, 2, 2, 2), w(4))
    same: dict[Any, Callable[..., Tensor]] = {
        aten.conv1d.padding: F.conv1d, aten.conv2d.padding: F.conv2d, aten.conv3d.padding: F.conv3d}
    for dims, (op, call) in enumerate(same.items(), 1):
        yield case(f"conv{dims}d of the same size", "n c o", op, lambda *o, call=call: call(*o, padding="same"),
                   x(4, 4, *(3,) * dims), w(4, 4, *(3,) * dims), w(4))


def resampling_cases() -> Iterator[Any]:
    def resize(mode: str) -> Callable[[Tensor], Tensor]:
        return lambda t: F.interpolate(t, scale_factor=2, mode=mode)

    calls: dict[Any, tuple[Callable[..., Any], int]] = {
        aten.max_pool1d.default: (lambda t: F.max_pool1d(t, 2), 1), aten.max_pool3d.default: (
            lambda t: F.max_pool3d(t, 2), 3),
        aten.avg_pool1d.default: (lambda t: F.avg_pool1d(t, 2), 1), aten.avg_pool3d.default: (
            lambda t: F.avg_pool3d(t, 2), 3),
        aten.adaptive_avg_pool3d.default: (lambda t: F.adaptive_avg_pool3d(t, 1), 3),
        aten.adaptive_max_pool1d.default: (lambda t: F.adaptive_max_pool1d(t, 2), 1),
        aten.adaptive_max_pool2d.default: (lambda t: F.adaptive_max_pool2d(t, 2), 2),
        aten.max_pool2d_with_indices.default: (lambda t: aten.max_pool2d_with_indices(t, [2, 2])[0], 2),
        aten.upsample_nearest1d.vec: (resize("nearest"), 1), aten.upsample_nearest2d.vec: (resize("nearest"), 2),
        aten.upsample_nearest3d.vec: (resize("nearest"), 3), aten.upsample_linear1d.vec: (resize("linear"), 1),
        aten.upsample_bilinear2d.vec: (resize("bilinear"), 2), aten.upsample_bicubic2d.vec: (resize("bicubic"), 2),
        aten.upsample_trilinear3d.vec: (resize("trilinear"), 3),
    }
    for op, (call, dims) in calls.items():
        yield case(str(op).removeprefix("aten."), "n c", op, call, x(4, 4, *(4,) * dims))
    yield case("grid_sample", "n c p q", aten.grid_sampler.default, lambda t, g: F.grid_sample(
        t, g.tanh(), align_corners=False), x(4, 4, 3, 3), x(4, 4, 4, 2))
    yield case("unfold", "n", aten.im2col.default, lambda t: F.unfold(t, 2), x(4, 2, 4, 4))
    yield case("fold", "n", aten.col2im.default, lambda t: F.fold(t, (4, 4), 2, stride=2), x(4, 8, 4))
    yield case("pixel_shuffle", "e0", aten.pixel_shuffle.default, lambda t: F.pixel_shuffle(t, 2), x(4, 8, 3, 3))
    yield case("pixel_unshuffle", "e0", aten.pixel_unshuffle.default, lambda t: F.pixel_unshuffle(t, 2), x(4, 2, 4, 4))


def product_cases() -> Iterator[Any]:
    yield case("mv", "m k", aten.mv.default, torch.mv, x(4, 8), w(8))
    yield case("dot", "k", aten.dot.default, torch.dot, x(8), w(8))
    yield case("vdot", "k", aten.vdot.default, torch.vdot, x(8), w(8))
    yield case("baddbmm", "b m k n", aten.baddbmm.default, lambda *o: torch.baddbmm(*o, beta=0.5, alpha=2.0),
               x(4, 4, 4), x(4, 4, 8), x(4, 8, 4))
    yield case("baddbmm that broadcasts", "b m k n", aten.baddbmm.default, torch.baddbmm, w(1, 1, 4), x(4, 4, 8),
               x(4, 8, 4))
    yield case("bilinear", "e0 a b o", aten.bilinear.default, F.bilinear, x(4, 4), x(4, 8), w(4, 4, 8), w(4))
    yield case("cdist", "e0 p r", aten.cdist.default, torch.cdist, x(4, 4, 3), x(4, 4, 3))


def bag_cases() -> Iterator[Any]:
    op, bag = aten.embedding_bag.padding_idx, F.embedding_bag
    for mode in ("sum", "mean", "max"):
        yield case(f"embedding_bag by {mode}", "d", op, lambda v, j, mode=mode: bag(
            j, v, starts(j), mode=mode), w(5, 4), i(5, 12))
    yield case("embedding_bag weighted", "d", op, lambda v, j, s: bag(
        j, v, starts(j), mode="sum", per_sample_weights=s), w(5, 4), i(5, 12), x(12))


def starts(j: Tensor) -> Tensor:
    """Bags of three."""
    return torch.full_like(j[:4], 3).cumsum(0) - 3


def recurrent_cases() -> Iterator[Any]:
    def weights(gates: int, width: int, hidden: int) -> tuple[Operand, ...]:
        return w(gates * hidden, width), w(gates * hidden, hidden), w(gates * hidden), w(gates * hidden)

    lstm, gru = weights(4, 3, 4), weights(3, 3, 4)
    yield case("lstm", "b", aten.lstm.input, lambda t, h, c, *p: torch.lstm(
        t, (h, c), p, True, 1, 0.0, True, False, False), x(3, 4, 3), x(1, 4, 4), x(1, 4, 4), *lstm)
    yield case("lstm with the batch in front", "b", aten.lstm.input, lambda t, h, c, *p: torch.lstm(
        t, (h, c), p, True, 1, 0.0, True, False, True)[0], x(4, 3, 3), x(1, 4, 4), x(1, 4, 4), *lstm)
    yield case("gru both ways", "b", aten.gru.input, lambda t, h, *p: torch.gru(
        t, h, p, True, 1, 0.0, True, True, False), x(3, 4, 3), x(2, 4, 4), *gru, *gru)
    for op, call in ((aten.rnn_tanh.input, torch.rnn_tanh), (aten.rnn_relu.input, torch.rnn_relu)):
        yield case(str(op).removeprefix("aten."), "b", op, lambda t, h, *p, call=call: call(
            t, h, p, True, 1, 0.0, True, False, False)[0], x(3, 4, 3), x(1, 4, 4), *weights(1, 3, 4))


CASES = [*norm_cases(), *convolution_cases(), *resampling_cases(), *product_cases(), *bag_cases(), *recurrent_cases()]
