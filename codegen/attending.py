"""Which of torch's fused attention kernels a segment is compiled with: the quickest for its shapes, as measured here.

    query (B, H, Q, D), key (B, G, K, D), value (B, G, K, E) of this rank, H a multiple of G; a mask or none

Every kernel is timed on noise, forward and backward, and where heads share keys and values (G < H) once with those as
they are and once with those repeated for every head: the kernels that take groups differ by version and by shape. The
order of `ATTENTION` stands unless another kernel is quicker by more than measurements differ by themselves.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autopar.codegen.private import ATTENTION
from autopar.passes.decision import Decision
from autopar.passes.functional import value_of
from autopar.passes.layout import local_shape
from autopar.passes.rules.nodes import argument

log = logging.getLogger("autopar")
aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
Shape = tuple[int, ...]
KERNELS = tuple(backend for backend in ATTENTION if backend is not SDPBackend.MATH)
SURELY = 0.97
"""The share of another's time under which a kernel is surely quicker."""
_WARMUP, _RUNS = 3, 10


@dataclass(frozen=True, slots=True)
class Scores:
    """One attention op on a device; `mask` is the shape of its mask, none where it is empty, `adds` whether that is
    added to the scores, else it hides some."""

    query: Shape
    key: Shape
    value: Shape
    dtype: torch.dtype
    causal: bool
    scale: float | None = None
    mask: Shape = ()
    adds: bool = False

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.query))
        shared = f" with {self.key[1]} heads of keys" if self.key[1] != self.query[1] else ""
        hidden = ", causal" if self.causal else ", masked" if self.mask else ""
        return f"{sizes} over {self.key[2]} keys{shared}{hidden}"


@dataclass(frozen=True, slots=True)
class Way:
    """A kernel, and whether keys and values go in as `groups` of heads share them."""

    kernel: SDPBackend
    groups: bool = False

    def __str__(self) -> str:
        return self.kernel.name.removesuffix("_ATTENTION").lower() + (" in groups" if self.groups else "")


Timer = Callable[[Scores, Way], float]
"""Seconds of a forward and a backward, infinite where the kernel does not take them."""


def quickest(scores: Scores, timer: Timer) -> Way:
    """The way to go. The first of `ATTENTION` where none of the kernels takes these, torch's formula does then."""
    ways = [Way(kernel, groups) for groups in ({False, scores.key[1] != scores.query[1]}) for kernel in KERNELS]
    seconds = {way: timer(scores, way) for way in ways}
    told = ", ".join(f"{way} {1e3 * seconds[way]:.3f} ms" for way in ways if math.isfinite(seconds[way]))
    log.debug("attention %s: %s", scores, told or "no kernel")
    best = min(ways, key=lambda way: seconds[way])
    usual = next((way for way in ways if math.isfinite(seconds[way])), ways[0])
    return best if seconds[best] < SURELY * seconds[usual] else usual


@cache
def timed(scores: Scores, way: Way) -> float:
    """Seconds on this rank's GPU, the mean of a few runs one after another."""
    made = _noise(scores, way)
    try:
        with warnings.catch_warnings(), sdpa_kernel(way.kernel):
            warnings.simplefilter("ignore")  # torch warns of why a kernel does not take them
            for _ in range(_WARMUP):
                _run(scores, *made)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_RUNS):
                _run(scores, *made)
            end.record()
            end.synchronize()
    except RuntimeError as refusal:  # that is how torch says that no kernel is available
        log.debug("attention %s, %s: %s", scores, way, str(refusal).partition("\n")[0])
        return math.inf
    return float(start.elapsed_time(end)) / 1e3 / _RUNS


def _noise(scores: Scores, way: Way) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Operands that lie as models make them, heads next to one another for each place."""
    def lying(shape: Shape) -> Tensor:
        batch, heads, length, width = shape
        x = torch.randn(batch, length, heads, width, dtype=scores.dtype, device="cuda")
        return x.transpose(1, 2).requires_grad_()

    key, value = (lying(shape if way.groups else (shape[0], scores.query[1], *shape[2:]))
                  for shape in (scores.key, scores.value))
    mask = None if not scores.mask else torch.zeros(scores.mask, dtype=scores.dtype, device="cuda")
    return lying(scores.query), key, value, mask if mask is None or scores.adds else mask == 0


def _run(scores: Scores, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    made = F.scaled_dot_product_attention(query, key, value, mask, 0.0, scores.causal, scale=scores.scale,
                                          enable_gqa=key.shape[1] != query.shape[1])
    torch.autograd.grad(made, (query, key, value), made)


def attentions(module: fx.GraphModule, decision: Decision) -> dict[fx.Node, Scores]:
    """The attention ops of a lowered segment that fused kernels may run, in 16 bits."""
    calls = (n for n in module.graph.nodes if n.op == "call_function" and n.target is SDPA and "lies" in n.meta)
    fit = (n for n in calls if len(n.meta["origin"].meta["val"].shape) == 4
           and n.meta["origin"].meta["val"].dtype in (torch.bfloat16, torch.float16))
    return {node: _scores(node, decision) for node in fit}


def _scores(node: fx.Node, decision: Decision) -> Scores:
    origin = node.meta["origin"]
    _, spec = node.meta["lies"]
    batch, heads, *_ = local_shape(decision.context.segmented.factored, origin, spec, decision.mesh)
    query, key, value, mask = (value_of(x) if isinstance(x, fx.Node) else None for x in (
        *origin.args[:3], argument(origin, 3, "attn_mask", None)))
    assert query is not None and key is not None and value is not None
    shared = _shared(node.args[1]), _shared(node.args[2])
    groups = [heads if each is None else _sizes(each)[1] for each in shared]
    of_mask = () if mask is None else _cut(tuple(mask.shape), tuple(query.shape), (batch, heads))
    return Scores((batch, heads, *query.shape[2:]), (batch, groups[0], *key.shape[2:]),
                  (batch, groups[1], *value.shape[2:]), query.dtype, argument(origin, 5, "is_causal", False),
                  argument(origin, 6, "scale", None), of_mask, mask is not None and mask.dtype != torch.bool)


def _cut(mask: Shape, query: Shape, local: Shape) -> Shape:
    """The local shape of a mask that is broadcast over scores."""
    whole = (1,) * (4 - len(mask)) + mask
    outer = (part if size == full else size for size, full, part in zip(whole, query, local, strict=False))
    return (*outer, *whole[2:])


def _shared(argument: Any) -> fx.Node | None:
    """What was repeated for every head of a group: the expansion of (B, G, 1, K, D) to (B, G, H / G, K, D)."""
    flat = argument if isinstance(argument, fx.Node) and argument.target is aten.reshape.default else None
    wide = flat.args[0] if flat is not None else None
    if not isinstance(wide, fx.Node) or wide.target is not aten.expand.default or len(_sizes(wide)) != 5:
        return None
    batch, groups, times, length, width = _sizes(wide)
    narrow = wide.args[0]
    fits = flat is not None and _sizes(flat) == [batch, groups * times, length, width]
    once = isinstance(narrow, fx.Node) and narrow.target is aten.reshape.default
    return wide if fits and once and _sizes(narrow) == [batch, groups, 1, length, width] else None  # type: ignore[arg-type]


def _sizes(node: fx.Node) -> list[int]:
    return list(node.args[1])  # type: ignore[arg-type]


def in_groups(module: fx.GraphModule, nodes: Iterable[fx.Node]) -> fx.GraphModule:
    """A copy in which attention at `nodes` takes keys and values as groups of heads share them."""
    names = {node.name for node in nodes}
    made = copy.copy(module)
    made.graph = copy.deepcopy(module.graph)
    for node in [n for n in made.graph.nodes if n.name in names]:
        query, *rest = node.args
        shared = [_once(node, x) if _shared(x) is not None else x for x in rest[:2]]
        node.args, node.kwargs = (query, *shared, *rest[2:]), {**node.kwargs, "enable_gqa": True}
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def _once(node: fx.Node, repeated: fx.Node) -> fx.Node:
    wide = _shared(repeated)
    assert wide is not None
    batch, groups, _, length, width = _sizes(wide)
    with node.graph.inserting_before(node):
        return node.graph.call_function(aten.reshape.default, (wide.args[0], [batch, groups, length, width]))


@dataclass(frozen=True, slots=True)
class Chosen:
    """What to compile a segment from, and the order in which torch tries its attention kernels."""

    module: fx.GraphModule
    order: tuple[SDPBackend, ...] = ATTENTION


def chosen(module: fx.GraphModule, decision: Decision, timer: Timer = timed) -> Chosen:
    """The quickest kernels for a lowered segment; where ops differ, in the order of the one with the most scores."""
    found = attentions(module, decision)
    if not found:
        return Chosen(module)
    ways = {node: quickest(scores, timer) for node, scores in found.items()}
    grouped = [node for node, way in ways.items() if way.groups]
    first = ways[max(found, key=lambda node: math.prod(found[node].query) * found[node].key[2])].kernel
    return Chosen(in_groups(module, grouped) if grouped else module,
                  (first, *(kernel for kernel in ATTENTION if kernel is not first)))
