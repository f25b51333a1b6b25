"""What runs in place of an op that is not the same op on a shard.

One function an op in `SUBSTITUTES`; it answers None where the plain op is right. Modules take the op's own
arguments, on local tensors, and those that draw random numbers a `seed` besides; those that talk to other ranks tell
what a call sends as `exchanges`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.codegen.attention import KernelAttention, fits
from autopar.codegen.batch_norm import Normalize, statistics
from autopar.codegen.collectives import convert
from autopar.codegen.communicator import Group
from autopar.codegen.draws import GlobalIndex, draw, keep_mask
from autopar.codegen.heads import linear_cross_entropy
from autopar.codegen.site import Site
from autopar.codegen.vocabulary import cross_entropy, embedding, nll
from autopar.core.reshard import Step
from autopar.passes.exchanges import Exchange, running_exchanges, statistic_exchanges
from autopar.passes.functional import value_of
from autopar.passes.layout import local_shape
from autopar.passes.own_ops import LINEAR_CROSS_ENTROPY
from autopar.passes.rules.nodes import argument, attention_dropout

aten = torch.ops.aten


class BatchNorm(nn.Module):
    """Batch norm whose statistics are those of the whole batch, running statistics whole on every rank.

    Weight and bias are used in the dtype of the running statistics: torch takes no others beside 16-bit values.
    x (N/n, C/c, …) local; weight and bias (C/c); running mean and variance (C).
    """

    def __init__(self, samples: Group, channels: Group) -> None:
        super().__init__()
        self.samples, self.channels = samples.axes, channels.axes
        self.sample_group, self.channel_group = samples, channels

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
                variance: Tensor | None, training: bool, momentum: float, eps: float, _: bool) -> Tensor:
        if not training or not (self.samples or self.channels):
            mean, variance = (None if part is None else self._part(part) for part in (mean, variance))
            return F.batch_norm(x, mean, variance, _like(weight, mean), _like(bias, mean), training, momentum, eps)
        with torch.no_grad():
            center, spread, count = found = statistics(x, self.sample_group)
            if mean is not None and variance is not None:
                mean.lerp_(self._whole(center).to(mean.dtype), momentum)
                variance.lerp_(self._whole(spread * (count / max(count - 1, 1))).to(variance.dtype), momentum)
        normal: Tensor = Normalize.apply(x, weight, bias, found, eps, self.sample_group)  # type: ignore[no-untyped-call]
        return normal

    def result(self, x: Tensor, *_: Any) -> Tensor:
        """An empty result, for shapes."""
        return torch.empty_like(x)

    def exchanges(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
                  variance: Tensor | None, training: bool, *_: Any) -> list[Exchange]:
        """What a call sends."""
        if not training:
            return []
        return (statistic_exchanges(x.shape[1], self.samples)
                + running_exchanges(x.shape[1] * self.channel_group.size, () if mean is None else self.channels))

    def _whole(self, part: Tensor) -> Tensor:
        return convert(part.detach(), Step(self.channels, 0, "R"), self.channel_group) if self.channels else part

    def _part(self, whole: Tensor) -> Tensor:
        return convert(whole, Step(self.channels, "R", 0), self.channel_group) if self.channels else whole


def _like(parameter: Tensor | None, statistic: Tensor | None) -> Tensor | None:
    return parameter if parameter is None or statistic is None else parameter.to(statistic.dtype)


def _index_of(site: Site) -> GlobalIndex:
    """Of the elements of what the op makes."""
    groups = tuple(site.group(axes) for axes in site.spec.dims)
    return GlobalIndex(site.factored.refined(site.node), groups, site.part)


def _index_of_weights(site: Site, keys: int) -> GlobalIndex:
    """Of an attention's weights, (B, H, Q, K), which are cut as what it makes, (B, H, Q, E), but for the last dim."""
    *rows, last = site.factored.dims[site.node]
    count, width = sum(map(len, rows)), math.prod(site.factored.sizes[f] for f in last)
    part = replace(site.part, stride=site.part.stride // width * keys) if site.part is not None else None
    groups = tuple(site.group(axes) for axes in (*site.spec.dims[:count], ()))
    return GlobalIndex((*site.factored.refined(site.node)[:count], keys), groups, part)


class Dropout(nn.Module):
    """Dropout that draws by global element, so that its mask does not depend on the plan."""

    takes_seed = True

    def __init__(self, index: GlobalIndex, salt: int) -> None:
        super().__init__()
        self.index, self.salt = index, salt

    def forward(self, x: Tensor, rate: float, train: bool, seed: Tensor) -> Tensor:
        keep = keep_mask(self.index(x.device, seed), seed, self.salt, rate).reshape(x.shape)
        return torch.where(keep, x / (1.0 - rate), torch.zeros((), dtype=x.dtype, device=x.device))

    def result(self, x: Tensor, *_: Any) -> Tensor:
        """An empty result, for shapes."""
        return torch.empty_like(x)


class Uniform(nn.Module):
    """Uniform numbers in [0, 1), the same for an element wherever it is drawn."""

    takes_seed = True

    def __init__(self, index: GlobalIndex, salt: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.index, self.salt, self.shape, self.dtype = index, salt, shape, dtype

    def forward(self, *_: Any, seed: Tensor, **__: Any) -> Tensor:
        drawn = draw(self.index(seed.device, seed), seed, self.salt) >> 8
        return (drawn.to(torch.float64) / 2**24).to(self.dtype).reshape(self.shape)

    def result(self, *_: Any) -> Tensor:
        """An empty result, for shapes."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Attention(nn.Module):
    """Attention with dropout on its weights, decomposed, so that the weights' mask does not depend on the plan.

    query (B, H, Q, D), key (B, H, K, D), value (B, H, K, E), sharded on B and H -> (B, H, Q, E).
    """

    takes_seed = True

    def __init__(self, index: GlobalIndex, salt: int) -> None:
        super().__init__()
        self.index, self.salt = index, salt

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
                enable_gqa: bool = False, seed: Tensor) -> Tensor:
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        if attn_mask is not None:
            hides = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if hides else scores + attn_mask
        weights = scores.softmax(-1)
        keep = keep_mask(self.index(query.device, seed), seed, self.salt, dropout_p)
        return torch.where(keep, weights / (1.0 - dropout_p), torch.zeros_like(weights)) @ value

    def result(self, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        """An empty result, for shapes."""
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _batch_norm(site: Site, _: int) -> nn.Module | None:
    samples, channels = site.axes("n"), site.axes("c")
    split_samples = samples if site.node.args[5] else ()
    dtypes = {value.dtype for value in map(value_of, site.node.args[1:4]) if value is not None}
    plain = not (split_samples or channels or len(dtypes) > 1)
    return None if plain else BatchNorm(site.group(split_samples), site.group(channels))


def _dropout(site: Site, salt: int) -> nn.Module:
    return Dropout(_index_of(site), salt)


def _uniform(site: Site, salt: int) -> nn.Module:
    shape = local_shape(site.factored, site.node, site.spec, site.communicator.mesh)
    return Uniform(_index_of(site), salt, shape, site.node.meta["val"].dtype)


def _attention(site: Site, salt: int) -> nn.Module | None:
    if not attention_dropout(site.node):
        return None
    query, key, value, mask = (value_of(argument(site.node, i, name, None)) for i, name in
                               enumerate(("query", "key", "value", "attn_mask")))
    assert query is not None and key is not None and value is not None
    if site.draws == "by kernel" and fits(query, value, mask):
        return KernelAttention(site.group(site.axes("b", "h")).index, salt)
    return Attention(_index_of_weights(site, key.shape[2]), salt)


SUBSTITUTES: dict[Any, Callable[[Site, int], nn.Module | None]] = {
    aten.batch_norm.default: _batch_norm,
    aten.cross_entropy_loss.default: cross_entropy,
    aten.dropout.default: _dropout,
    aten.embedding.default: embedding,
    aten.nll_loss_nd.default: nll,
    aten.rand.default: _uniform,
    aten.scaled_dot_product_attention.default: _attention,
    LINEAR_CROSS_ENTROPY: linear_cross_entropy,
}


def substitute(site: Site, salt: int) -> nn.Module | None:
    """The module that runs in place of the op at `site`, None where the op itself is right."""
    make = SUBSTITUTES.get(site.node.target)
    return make(site, salt) if make else None
