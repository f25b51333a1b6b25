"""Evaluate what depends on no input, and recognise attention masks.

Index, position and mask subgraphs of an exported model are functions of shapes alone. They are run once, on
the CPU, and kept as constants. A mask equal to the lower triangle becomes `is_causal`, one that hides nothing
becomes none: a materialised mask would rule out flash attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from autopar.passes.capture import Program, Source
from autopar.passes.evaluate import collapsed, evaluate
from autopar.passes.functional import value_of

aten = torch.ops.aten
RANDOM = {aten.rand.default, aten.randn.default, aten.randint.default, aten.randperm.default, aten.bernoulli.default,
          aten.rand_like.default, aten.randn_like.default, aten.dropout.default}
SDPA = aten.scaled_dot_product_attention.default
SHAPE_ONLY = {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.zeros_like.default,
              aten.ones_like.default, aten.full_like.default}
"""Ops whose value depends on the shape of their operand alone."""
_MASK_POSITION = 3


@dataclass(frozen=True, slots=True)
class FoldConstants:
    """Replace every maximal constant subgraph by a placeholder holding its value."""

    def __call__(self, program: Program) -> Program:
        values = _evaluate(program)
        attentions = [n for n in program.graph.nodes if n.target == SDPA]
        masks = [mask for mask in dict.fromkeys(map(_mask, attentions)) if mask in values]
        patterns = {mask: mask_pattern(values[mask]) for mask in masks}
        notes = tuple(dict.fromkeys(_fold_mask(n, patterns) for n in attentions))
        frontier = [n for n in values if n.op == "call_function" and any(u not in values for u in n.users)]
        kept = {n: values[n] for n in frontier if isinstance(values[n], Tensor)}
        named = {_place(program.graph, node, value): value for node, value in kept.items()}
        for node in reversed(list(program.graph.nodes)):
            if node in values and node.op == "call_function" and not node.users:
                program.graph.erase_node(node)
        sources = program.sources | {name: Source("constant", name) for name in named}
        return replace(program, sources=sources, constants=program.constants | named, notes=program.notes + notes)


def _evaluate(program: Program) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {n: program.constants[n.name] for n in program.placeholders("constant")}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target in RANDOM:
            continue
        if all(i in values for i in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = evaluate(node, args, kwargs)
        elif node.target in SHAPE_ONLY:
            operand = value_of(node.args[0])
            assert operand is not None
            like = torch.empty(operand.shape, dtype=operand.dtype)
            values[node] = evaluate(node, (like, *node.args[1:]), dict(node.kwargs))
    return values


def _place(graph: fx.Graph, node: fx.Node, value: Tensor) -> str:
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        placeholder = graph.placeholder(f"constant_{node.name}")
    placeholder.meta = {"val": value.to("meta"), "path": node.meta.get("path", ""), "constant": True}
    node.replace_all_uses_with(placeholder)
    return str(placeholder.name)


def _mask(node: fx.Node) -> Any:
    """The mask of the attention `node`, None where it has none."""
    return node.args[_MASK_POSITION] if len(node.args) > _MASK_POSITION else node.kwargs.get("attn_mask")


def _fold_mask(node: fx.Node, patterns: dict[Any, str]) -> str:
    """Rewrite the attention `node` if its mask is a known pattern; returns what it is."""
    mask = _mask(node)
    if mask is None:
        causal = bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))
        return "attention: causal" if causal else "attention: full"
    pattern = patterns.get(mask, "masked")
    if pattern != "masked":
        node.kwargs = {**_named_kwargs(node), "attn_mask": None, "is_causal": pattern == "causal"}
        node.args = node.args[:_MASK_POSITION]
    return f"attention: {pattern}"


def _named_kwargs(node: fx.Node) -> dict[str, Any]:
    names = ("attn_mask", "dropout_p", "is_causal")
    return {**dict(zip(names, node.args[_MASK_POSITION:], strict=False)), **node.kwargs}


def mask_pattern(mask: Tensor) -> str:
    """`causal`, `full` or `masked`: what a (…, queries, keys) mask lets through, boolean or additive."""
    queries, keys = mask.shape[-2:]
    mask = collapsed(mask)
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((hidden | (mask == 0)).all()):
            return "masked"
        mask = ~hidden
    if bool(mask.all()):
        return "full"
    triangle = torch.ones(queries, keys, dtype=torch.bool).tril()
    return "causal" if queries == keys and bool((mask == triangle).all()) else "masked"


def constant_value(program: Program, node: fx.Node) -> Tensor | None:
    """The value of a constant placeholder, None for any other node."""
    return program.constants.get(node.name) if value_of(node) is not None else None
