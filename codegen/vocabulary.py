"""Lookups and losses whose vocabulary is cut: each rank has some rows of the table, some classes of the logits.

A rank answers for the numbers it has; what the others have comes as a partial sum. Only the log-sum-exp of each row
is exchanged, never logits. Source: Shoeybi et al., "Megatron-LM" (2019), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.codegen.communicator import Group
from autopar.codegen.primitives import all_gather, all_reduce
from autopar.codegen.site import Site
from autopar.passes.exchanges import Exchange, class_exchanges, count_exchanges, factors_of, wide_bytes
from autopar.passes.rules.losses import MEAN, NONE, row_letters
from autopar.passes.rules.nodes import argument, shape
from autopar.passes.strategies import axes_of


@dataclass(frozen=True, slots=True)
class Places:
    """Which of a dim's numbers this rank has, and as which of its own; the dim's factors, outermost first, are cut over
    one group each."""

    sizes: tuple[int, ...]
    groups: tuple[Group, ...]

    @property
    def whole(self) -> int:
        """The size of the whole dim."""
        return math.prod(self.sizes)

    def of(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each number of the whole is this rank's, and its place here, 0 where it is not.

        A number that the whole does not have gets a place that no rank has, which whoever looks there refuses.
        """
        here, place, stride = torch.ones_like(number, dtype=torch.bool), torch.zeros_like(number), self.whole
        for size, group in zip(self.sizes, self.groups, strict=True):
            stride //= size
            part = size // group.size
            own = number // stride % size - group.index * part
            here, place = here & (own >= 0) & (own < part), place * part + own
        known = (number >= 0) & (number < self.whole)
        return here, place.where(here, 0).where(known, self.whole)

    def is_unknown(self, place: Tensor) -> Tensor:
        """Which of the places are of numbers that the whole does not have."""
        return place == self.whole

    def of_one(self, number: int) -> int:
        """The place of one number here, -1 where it is not."""
        place, stride = 0, self.whole
        for size, group in zip(self.sizes, self.groups, strict=True):
            stride //= size
            part = size // group.size
            own = number // stride % size - group.index * part
            if not 0 <= own < part:
                return -1
            place = place * part + own
        return place


def places_of(site: Site, letter: str) -> Places:
    factors = factors_of(site.op, letter)
    groups = (site.group(axes_of(site.assignment, f.key)) for f in factors)
    return Places(tuple(f.size for f in factors), tuple(groups))


class Embedding(nn.Module):
    """Lookup in a table (V/n, D) cut by rows: zeros for the rows of others, a partial sum.

    indices (…) of the whole table -> (…, D). Row `padding_idx` gets no gradient.
    """

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def forward(self, weight: Tensor, indices: Tensor, padding_idx: int = -1, *_: Any) -> Tensor:
        here, place = self.places.of(indices)
        padding = self.places.of_one(padding_idx) if padding_idx >= 0 else -1
        found = F.embedding(place, weight, None if padding < 0 else padding)
        return torch.where(here.unsqueeze(-1), found, torch.zeros((), dtype=found.dtype, device=found.device))

    def result(self, weight: Tensor, indices: Tensor, *_: Any) -> Tensor:
        """An empty result, for shapes."""
        return weight.new_empty((*indices.shape, weight.shape[1]))


class ClassesApart(torch.autograd.Function):
    """Cross entropy of each row over classes of which this rank has some; over all ranks of `group` they sum to it.

    The rank of the row's class brings (1 - s)·(log-sum-exp - its logit), s being the label smoothing, and each its
    classes' share of the mean. logits (T, C/n, …), target (T, …) -> (T, …) in fp32 at least. The gradient that comes
    is the same on all ranks.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, places: Places, group: Group, ignored: int,
                smoothing: float) -> Tensor:
        x = _wide(logits)
        total = torch.logsumexp(all_gather(torch.logsumexp(x, 1).unsqueeze(0), group, 0), 0)
        counted = target != ignored
        here, place = places.of(target.where(counted, 0))
        found = total - x.gather(1, place.unsqueeze(1)).squeeze(1)
        rows = found.where(here, 0.0) * (1.0 - smoothing)
        if smoothing:
            rows = rows + (total * x.shape[1] - x.sum(1)) * (smoothing / places.whole)
        ctx.save_for_backward(logits, target, total)
        ctx.places, ctx.ignored, ctx.smoothing = places, ignored, smoothing
        return rows.where(counted, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, total = ctx.saved_tensors
        counted = target != ctx.ignored
        here, place = ctx.places.of(target.where(counted, 0))
        slope = (_wide(logits) - total.unsqueeze(1)).exp_().sub_(ctx.smoothing / ctx.places.whole)
        slope.scatter_add_(1, place.unsqueeze(1), here.unsqueeze(1).to(slope.dtype) * (ctx.smoothing - 1.0))
        slope.mul_(grad.where(counted, 0.0).unsqueeze(1))
        return slope.to(logits.dtype), None, None, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if wide_bytes(x.dtype) == x.dtype.itemsize else x.float()


Plain = Callable[[Tensor, Tensor, Tensor | None, int, float], Tensor]
"""(logits, target, weight, ignored target, smoothing) -> the loss of each row, of classes that are whole."""


def _cross_entropies(logits: Tensor, target: Tensor, weight: Tensor | None, ignored: int, smoothing: float) -> Tensor:
    return F.cross_entropy(logits, target, weight, ignore_index=ignored, reduction="none", label_smoothing=smoothing)


def _likelihoods(logits: Tensor, target: Tensor, weight: Tensor | None, ignored: int, _: float) -> Tensor:
    return F.nll_loss(logits, target, weight, ignore_index=ignored, reduction="none")


PLAIN: dict[str, Plain] = {"cross_entropy": _cross_entropies, "nll_loss": _likelihoods}
"""By name, the losses that may have rows and classes cut."""


class CrossEntropy(nn.Module):
    """Cross entropy of rows and classes that are cut: a partial sum over the axes of both.

    A mean is this rank's sum over the count of all ranks. logits (T/n, C/m, …), target (T/n, …) class numbers or
    (T/n, C, …) probabilities; targets equal to `ignore_index` count nowhere, others by their class's `weight`.
    """

    def __init__(self, rows: Group, classes: Group, places: Places, plain: Plain) -> None:
        super().__init__()
        self.rows, self.classes, self.plain, self.places = rows.axes, classes.axes, plain, places
        self.row_group, self.class_group = rows, classes

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN,
                ignore_index: int = -100, label_smoothing: float = 0.0) -> Tensor:
        if self.classes:
            loss: Tensor = ClassesApart.apply(  # type: ignore[no-untyped-call]
                logits, target, self.places, self.class_group, ignore_index, label_smoothing)
        else:
            loss = self.plain(logits, target, weight, ignore_index, label_smoothing)
        if reduction != NONE:
            loss = _wide(loss).sum()
        if reduction == MEAN:
            loss = loss / self._count(logits, target, weight, ignore_index).to(loss.dtype)
        return loss.to(logits.dtype)

    def _count(self, logits: Tensor, target: Tensor, weight: Tensor | None, ignored: int) -> Tensor:
        """What a mean divides by: the rows of all ranks that count, each by its class's weight."""
        if target.is_floating_point():
            return torch.tensor(logits.numel() // logits.shape[1] * self.row_group.size)
        counted = target != ignored
        if weight is None:
            return all_reduce(counted.sum(), self.row_group)
        return all_reduce(weight[target.where(counted, 0)].where(counted, 0).sum(), self.row_group)

    def result(self, logits: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN,
               *_: Any) -> Tensor:
        """An empty result, for shapes."""
        return logits.new_empty([n for dim, n in enumerate(logits.shape) if dim != 1] if reduction == NONE else ())

    def exchanges(self, logits: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN,
                  *_: Any) -> list[Exchange]:
        """What a call sends."""
        counted = reduction == MEAN and not target.is_floating_point()
        rows = logits.numel() // logits.shape[1]
        return (class_exchanges(rows, logits.dtype, self.classes, self.class_group.size)
                + count_exchanges(self.rows if counted else ()))


def embedding(site: Site, _: int) -> nn.Module | None:
    """A lookup in a table cut by rows; None where it is whole."""
    return Embedding(places_of(site, "v")) if site.axes("v") else None


def _loss(plain: Plain) -> Callable[[Site, int], nn.Module | None]:
    """A loss whose classes are cut, or whose rows are under a mean; None where the plain op is right."""
    def make(site: Site, _: int) -> nn.Module | None:
        rows, classes = site.axes(*row_letters(len(shape(site.node.args[0])))), site.axes("c")
        mean = argument(site.node, 3, "reduction", MEAN) == MEAN
        if not (classes or (rows and mean)):
            return None
        return CrossEntropy(site.group(rows), site.group(classes), places_of(site, "c"), plain)
    return make


cross_entropy, nll = (_loss(PLAIN[name]) for name in ("cross_entropy", "nll_loss"))
