"""A segment's forward and backward as AOTAutograd parts them, traced without memory: what a compiler is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.codegen import private
from autopar.codegen.arrivals import Arrival
from autopar.codegen.footprint import Footprint, Run, ends_of
from autopar.codegen.graph_bytes import Inputs, bases_of, memory_of, nbytes_of, peak, plain_peak

CPU = torch.device("cpu")
Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]
Peak = Callable[[fx.Graph, Inputs, int], int]


@dataclass(frozen=True, eq=False)
class Parts:
    """`forward` maps arguments to results and what is saved, `backward` what is saved and gradients to gradients; None
    where no gradient flows. Before the results come `written` values, which are copied into buffers. Where a segment
    is not `alone` on its device's autograd graph, the gradients that come to its backward are held throughout.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    results: int
    arguments: int
    written: int = 0
    alone: bool = False


def parted(run: Run, given: Sequence[Arrival], seeds: int, partition: Partition | None = None) -> Parts:
    """The parts of `run(*given, *seeds)`; by default as Inductor has them, which keeps what costs least to keep."""
    found: dict[str, fx.GraphModule] = {}
    with private.without_values():
        arguments = [each.blank(CPU) for each in given] + [torch.zeros((), dtype=torch.int64)] * seeds
        results = private.traced(run, arguments, found.setdefault, partition)
        loss = ends_of(results)
        if loss is not None:
            loss.backward()
    return Parts(found["forward"], found.get("backward"), len(results), len(arguments))


def compiled_footprint(parts: Parts, grain: int = 1) -> Footprint:
    """The bytes of a segment compiled from `parts`."""
    return _footprint(parts, peak, grain)


def interpreted_footprint(parts: Parts, grain: int = 1) -> Footprint:
    """The bytes of a segment whose `parts` run op by op."""
    return _footprint(parts, plain_peak, grain)


def _footprint(parts: Parts, most: Peak, grain: int) -> Footprint:
    outputs: list[Any] = list(next(n for n in parts.forward.graph.nodes if n.op == "output").args[0])
    inputs = [n for n in parts.forward.graph.nodes if n.op == "placeholder"]
    first, behind = parts.written, parts.written + parts.results
    results, kept = outputs[first:behind], [n for n in outputs[behind:] if isinstance(n, fx.Node)]
    base = bases_of(parts.forward.graph)
    bases = [base[n] if isinstance(n, fx.Node) else None for n in results]
    own = {base[n] for n in kept} - set(inputs) - set(bases)
    sizes = [0 if b is None or b in inputs or b in bases[:i] else nbytes_of(b.meta["val"], grain)
             for i, b in enumerate(bases)]
    read = {base[n] for n in kept}
    results_read = tuple(i for i, b in enumerate(bases) if b in read and b not in inputs)
    backward = _backward(parts, kept, base, inputs, bases, most, grain) + sum(sizes[i] for i in results_read)
    return Footprint(sum(nbytes_of(n.meta["val"], grain) for n in own),
                     tuple(i for i, n in enumerate(inputs) if n in read), results_read, tuple(sizes),
                     most(parts.forward.graph, Inputs(inputs), grain), backward if parts.backward is not None else 0)


def _backward(parts: Parts, kept: list[fx.Node], base: dict[fx.Node, fx.Node], inputs: list[fx.Node],
              bases: list[fx.Node | None], most: Peak, grain: int) -> int:
    """The most of the backward; arguments and results that it reads are held by others."""
    if parts.backward is None:
        return 0
    placeholders = [n for n in parts.backward.graph.nodes if n.op == "placeholder"]
    given = {n.name: base[n] for n in kept}
    others = [n for n in placeholders if given.get(n.name) in inputs or (n.name in given and given[n.name] in bases)]
    memory = {n.name: memory_of(n) for n in kept}
    first = {memory[n.name]: n for n in reversed(placeholders) if n.name in memory}
    same = {n: first[memory[n.name]] for n in placeholders if n.name in memory and first[memory[n.name]] is not n}
    came = () if parts.alone else [n for n in placeholders if n.name not in given]
    return most(parts.backward.graph, Inputs(others, came, same), grain)
