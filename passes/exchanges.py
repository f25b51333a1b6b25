"""What ranks exchange inside of an op that is not the same op on a shard, before anything is lowered.

One function an op in `EXCHANGES`; what runs tells the same of itself, so that prices can be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from autopar.core.chunks import rows_at_once
from autopar.core.mesh import Mesh
from autopar.core.reshard import Price, Primitive
from autopar.core.sharding import Choice, Phase
from autopar.passes.functional import value_of
from autopar.passes.ops import Factor, Op
from autopar.passes.own_ops import LINEAR_CROSS_ENTROPY
from autopar.passes.rules.losses import MEAN, row_letters
from autopar.passes.rules.nodes import argument
from autopar.passes.strategies import Assignment, axes_of

aten = torch.ops.aten
Axes = tuple[int, ...]
COUNT_BYTES = 8.0
STATISTIC_BYTES = 8.0
"""Batch norm's statistics are taken in fp64."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One collective inside an op; `nbytes` as in `core.reshard.Price`."""

    phase: Phase
    primitive: Primitive
    axes: Axes
    nbytes: float


def wide_bytes(dtype: torch.dtype) -> int:
    """Bytes an element of what is computed in fp32 at least."""
    return max(4, dtype.itemsize)


def class_exchanges(rows: int, dtype: torch.dtype, classes: Axes, parts: int) -> list[Exchange]:
    """Each part's log-sum-exp of every row."""
    return [Exchange("forward", "all_gather", classes, float(rows * parts * wide_bytes(dtype)))] if classes else []


def count_exchanges(rows: Axes) -> list[Exchange]:
    """The number, or the weight, of the rows that count."""
    return [Exchange("forward", "all_reduce", rows, COUNT_BYTES)] if rows else []


def chunk_exchanges(rows: int, weight: tuple[int, int], dtype: torch.dtype, classes: Axes,
                    parts: int) -> list[Exchange]:
    """The same chunk by chunk, of rows by a weight (classes, width) of these local sizes."""
    at_once = rows_at_once(rows, weight[1], weight[0])
    chunks = [min(at_once, rows - first) for first in range(0, rows, at_once)]
    return [exchange for chunk in chunks for exchange in class_exchanges(chunk, dtype, classes, parts)]


def statistic_exchanges(channels: int, samples: Axes) -> list[Exchange]:
    """Sums and squares of channels, and those of their gradients."""
    nbytes = 2 * channels * STATISTIC_BYTES
    phases: tuple[Phase, Phase] = ("forward", "backward")
    return [Exchange(phase, "all_reduce", samples, nbytes) for phase in phases] if samples else []


def running_exchanges(channels: int, over: Axes) -> list[Exchange]:
    """Mean and variance of all `channels`, for running statistics that are whole on every rank."""
    return [Exchange("forward", "all_gather", over, channels * STATISTIC_BYTES)] * 2 if over else []


@dataclass(frozen=True, slots=True)
class Cut:
    """How an op is cut: `axes(letter)` are those over any factor of a letter of its rule; extents are of the mesh."""

    op: Op
    assignment: Assignment
    mesh: Mesh

    def axes(self, *letters: str) -> Axes:
        """The axes over any factor of `letters`, ascending."""
        return tuple(sorted(axis for f in factors_of(self.op, *letters) for axis in axes_of(self.assignment, f.key)))


def factors_of(op: Op, *letters: str) -> list[Factor]:
    """The factors that dims called `letters` are made of, outermost first."""
    return [f for f in op.factors if f.key.rpartition("_")[0] in letters or f.key in letters]


def _cross_entropy(node: fx.Node, cut: Cut) -> list[Exchange]:
    logits, target = value_of(node.args[0]), value_of(node.args[1])
    assert logits is not None and target is not None
    rows, classes = cut.axes(*row_letters(logits.ndim)), cut.axes("c")
    here = logits.numel() // logits.shape[1] // cut.mesh.extent(rows)
    counted = argument(node, 3, "reduction", MEAN) == MEAN and not target.is_floating_point()
    return (class_exchanges(here, logits.dtype, classes, cut.mesh.extent(classes))
            + count_exchanges(rows if counted else ()))


def _linear_cross_entropy(node: fx.Node, cut: Cut) -> list[Exchange]:
    hidden, weight = value_of(node.args[0]), value_of(node.args[2])
    assert hidden is not None and weight is not None
    rows, classes = cut.axes("t"), cut.axes("n")
    parts = cut.mesh.extent(classes)
    counted = argument(node, 3, "reduction", MEAN) == MEAN
    here = len(weight) // parts, weight.shape[1]
    return (chunk_exchanges(len(hidden) // cut.mesh.extent(rows), here, hidden.dtype, classes, parts)
            + count_exchanges(rows if counted else ()))


def _batch_norm(node: fx.Node, cut: Cut) -> list[Exchange]:
    x = value_of(node)
    assert x is not None
    samples, channels = cut.axes("n"), cut.axes("c")
    if not node.args[5]:
        return []
    running = node.args[3] is not None
    return (statistic_exchanges(x.shape[1] // cut.mesh.extent(channels), samples)
            + running_exchanges(x.shape[1], channels if running else ()))


EXCHANGES: dict[Any, Callable[[fx.Node, Cut], list[Exchange]]] = {
    aten.batch_norm.default: _batch_norm,
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.nll_loss_nd.default: _cross_entropy,
    LINEAR_CROSS_ENTROPY: _linear_cross_entropy,
}


def exchange_seconds(exchanges: Iterable[Exchange], price: Price) -> tuple[float, float]:
    """Seconds forward and backward."""
    seconds = {"forward": 0.0, "backward": 0.0}
    for exchange in exchanges:
        seconds[exchange.phase] += price(exchange.primitive, exchange.axes, exchange.nbytes)
    return seconds["forward"], seconds["backward"]


def with_exchanges(op: Op, choices: list[Choice], options: Sequence[Assignment], mesh: Mesh, price: Price
                   ) -> list[Choice]:
    """The choices, one an assignment, with the seconds of what is exchanged inside of the op."""
    if op.main.target not in EXCHANGES:
        return choices
    found = []
    for choice, assignment in zip(choices, options, strict=True):
        forward, backward = exchange_seconds(EXCHANGES[op.main.target](op.main, Cut(op, assignment, mesh)), price)
        # no gradient, no backward
        found.append(replace(choice, forward=choice.forward + forward,
                             backward=choice.backward + backward if choice.backward else 0.0))
    return found
