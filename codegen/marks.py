"""Marks on what a lowered segment makes, by which a plan's values are found again in the traced joint graph.

A mark is an op that does nothing, put behind a value. It comes through Dynamo and AOTAutograd like any other op, and is
taken out where the joint graph is partitioned, so none ever runs. The names do not depend on which of a class's
segments is lowered, nor on the rank:

    3.0        the first result of the segment's op 3
    x2>S0R     the segment's external 2, brought to a spec; 3.0>S0R a result
    p4         the parameter that is external 4, in the dtype that is computed in
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from autopar.codegen.lower import Lowered

aten = torch.ops.aten


@torch.library.custom_op("autopar::mark", mutates_args=())
def mark(x: Tensor, name: str) -> Tensor:
    """`x`, while tracing."""
    raise AssertionError(f"mark {name} is left in a graph that runs")


@mark.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing has to be known for the backward."""


mark.register_autograd(lambda _, gradient: (gradient, None), setup_context=_nothing)
MARK = torch.ops.autopar.mark.default


def marked(lowered: Lowered) -> fx.GraphModule:
    """The module of a lowered segment with a mark behind everything that a plan can keep."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    found = names(lowered)
    for node in lowered.module.graph.nodes:
        copied = env[node] = graph.node_copy(node, env.__getitem__)
        if node in found:
            env[node] = graph.call_function(MARK, (copied, found[node]))
    return fx.GraphModule(lowered.module, graph, lowered.segment.name)


def names(lowered: Lowered) -> dict[fx.Node, str]:
    """What each node is called that a plan can keep."""
    return _called(lowered)[0]


def exported(lowered: Lowered) -> dict[str, fx.Node]:
    """By their names, the values that leave the segment, as exports of the program."""
    place = _called(lowered)[1]
    results = lowered.module.graph.output_node().args[0]
    return {place[made]: node for made, node in zip(results, lowered.exports, strict=True)}  # type: ignore[arg-type]


def _called(lowered: Lowered) -> tuple[dict[fx.Node, str], dict[fx.Node, str]]:
    """The names of what a plan can keep, and for every node the name of what it is or is made from."""
    first, nodes = lowered.segment.first, lowered.module.graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder"]
    place = {node: f"x{i}" for i, node in enumerate(inputs)}
    found: dict[fx.Node, str] = {}
    for node in nodes:
        name = _name(node, place, first)
        while name is not None and name in found.values():
            name += "'"
        if name is not None:
            found[node] = name
        sources = node.all_input_nodes
        place.setdefault(node, name or (place[sources[0]] if sources else node.name))
    return found, place


def _name(node: fx.Node, place: dict[fx.Node, str], first: int) -> str | None:
    """What `node` is called, before it is told from others of that name; None for what no plan keeps."""
    if "reshard" in node.meta:
        return f"{place[node.all_input_nodes[0]]}>{node.meta['lies'][1]}"
    if node.target is aten.to.dtype and "op" not in node.meta:
        return place[node.all_input_nodes[0]].replace("x", "p")
    return f"{node.meta['op'] - first}.{node.meta['part']}" if node.meta.get("part") is not None else None
