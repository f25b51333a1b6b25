"""Losses: of class numbers, of probabilities, term by term."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.rules.cases import b, case, i, targets, w, x

aten = torch.ops.aten


def loss_cases() -> Iterator[Any]:
    op, call = aten.cross_entropy_loss.default, F.cross_entropy

    def loss(**options: Any) -> Callable[..., Tensor]:
        return lambda *o: call(*o, **options)

    maps, mapped = x(2, 8, 2, 2), lambda g: targets(8, 8)(g).view(2, 2, 2)
    yield case("cross_entropy", "t c", op, call, x(8, 4), i(4, 8))
    yield case("cross_entropy ignoring", "t c", op, call, x(8, 4), targets(8, 4))
    yield case("cross_entropy ignoring a class", "t c", op, loss(ignore_index=2), x(8, 4), i(4, 8))
    yield case("cross_entropy smoothed", "t c", op, loss(label_smoothing=0.2), x(8, 8), targets(8, 8))
    yield case("cross_entropy summed", "t c", op, loss(reduction="sum"), x(8, 4), targets(8, 4))
    yield case("cross_entropy by row", "t c", op, loss(reduction="none", label_smoothing=0.1), x(8, 8), targets(8, 8))
    yield case("cross_entropy of many classes", "t_0 t_1 c_0 c_1", op, lambda t, y: call(t.reshape(16, 16), y.view(16)),
               x(4, 4, 4, 4), i(16, 4, 4))
    yield case("cross_entropy weighted", "t", op, loss_weighted, x(8, 4), targets(8, 4), b(4))
    yield case("cross_entropy weighted by row", "t", op, loss(reduction="none"), x(8, 4), targets(8, 4), b(4))
    yield case("cross_entropy of maps", "t c s0 s1", op, call, maps, mapped)
    yield case("cross_entropy of maps weighted and smoothed", "t s0 s1", op, loss_weighted, maps, mapped, b(8))
    yield case("cross_entropy of maps by row", "t c s0 s1", op, loss(reduction="none"), maps, mapped)
    yield case("cross_entropy of probabilities", "t", op, call, x(8, 4), x(8, 4))
    yield case("cross_entropy of summed probabilities", "t", op, loss(reduction="sum", label_smoothing=0.1), x(8, 4),
               x(8, 4))
    yield case("cross_entropy of a row", "", op, call, x(8), i(8))


def loss_weighted(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, weight, label_smoothing=0.1)


def likelihood_cases() -> Iterator[Any]:
    op = aten.nll_loss_nd.default

    def loss(**options: Any) -> Callable[..., Tensor]:
        return lambda t, *o: F.nll_loss(t, *o, **options)

    yield case("nll_loss", "t", op, loss(), x(8, 4), targets(8, 4))
    yield case("nll_loss weighted", "t", op, loss(), x(8, 4), targets(8, 4), b(4))
    yield case("nll_loss summed", "t", op, loss(reduction="sum"), x(8, 4), targets(8, 4))
    yield case("nll_loss by row", "t", op, loss(reduction="none"), x(8, 4), targets(8, 4))
    yield case("nll_loss of maps", "t s0", op, loss(), x(4, 4, 4), i(4, 4, 4))


def pointwise_loss_cases() -> Iterator[Any]:
    calls: dict[str, tuple[Any, Callable[..., Tensor]]] = {
        "mse_loss": (aten.mse_loss.default, F.mse_loss),
        "l1_loss": (aten.l1_loss.default, F.l1_loss),
        "smooth_l1_loss": (aten.smooth_l1_loss.default, lambda *o, **k: F.smooth_l1_loss(*o, beta=0.3, **k)),
        "huber_loss": (aten.huber_loss.default, lambda *o, **k: F.huber_loss(*o, delta=0.3, **k)),
        "bce_with_logits": (aten.binary_cross_entropy_with_logits.default, F.binary_cross_entropy_with_logits),
    }
    for name, (op, call) in calls.items():
        yield case(name, "o0 o1", op, call, x(4, 8), w(4, 8))
    mse, bce, kl = aten.mse_loss.default, aten.binary_cross_entropy_with_logits.default, aten.kl_div.default
    yield case("mse_loss summed", "o0 o1", mse, lambda *o: F.mse_loss(*o, reduction="sum"), x(4, 8), x(4, 8))
    yield case("mse_loss by element", "o0 o1", mse, lambda *o: F.mse_loss(*o, reduction="none"), x(4, 8), x(4, 8))
    yield case("mse_loss broadcast", "o0 o1", mse, lambda t, y: F.mse_loss(*torch.broadcast_tensors(t, y)), x(4, 8),
               x(8))
    yield case("bce", "o0 o1", aten.binary_cross_entropy.default,
               lambda t, y: F.binary_cross_entropy(t.sigmoid(), y.sigmoid()), x(4, 8), x(4, 8))
    yield case("soft_margin_loss", "o0 o1", aten.soft_margin_loss.default, F.soft_margin_loss, x(4, 8), i(2, 4, 8))
    yield case("bce_with_logits weighted", "o0 o1", bce,
               lambda t, y, v: F.binary_cross_entropy_with_logits(t, y, pos_weight=v), x(4, 8), x(4, 8), b(8))
    yield case("kl_div", "o0 o1", kl, lambda t, y: F.kl_div(t, y.exp()), x(4, 8), x(4, 8))
    yield case("kl_div of logarithms", "o0 o1", kl, lambda *o: F.kl_div(*o, reduction="batchmean", log_target=True),
               x(4, 8), x(4, 8))


def head_cases() -> Iterator[Any]:
    op = torch.ops.autopar.linear_cross_entropy

    def loss(*options: Any) -> Callable[..., Tensor]:
        return lambda h, y, v, *bias: op(h, y, v, *options, *bias)

    yield case("head", "t n", op.default, op, x(8, 3), i(4, 8), w(4, 3))
    yield case("head ignoring", "t n", op.default, op, x(8, 3), targets(8, 8), w(8, 3))
    yield case("head ignoring a class, with bias", "t n", op.default, loss(1, 2), x(8, 3), i(4, 8), w(4, 3), w(4))
    yield case("head summed", "t n", op.default, loss(2, -100), x(8, 3), targets(8, 4), w(4, 3), w(4))
    yield case("head in fp32", "t n", op.default, loss(1, -100, None, torch.float64), x(8, 3), i(4, 8), w(4, 3))
    yield case("head of many classes", "t_0 t_1 n_0", op.default,
               lambda h, y, v: op(h.reshape(16, 3), y.view(16), v.reshape(16, 3)), x(4, 4, 3), i(16, 4, 4), w(4, 4, 3))


CASES = [*loss_cases(), *head_cases(), *likelihood_cases(), *pointwise_loss_cases()]
