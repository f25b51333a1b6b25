"""Ops that are only a way to write others are taken apart into those, which have rules."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from autopar.passes.capture import Program
from autopar.passes.functional import emit, value_of
from autopar.passes.rules.nodes import shape
from autopar.passes.rules.table import rule_of

aten = torch.ops.aten
COMPOSITES = {
    aten.atleast_1d.default, aten.atleast_2d.default, aten.atleast_3d.default, aten.broadcast_tensors.default,
    aten.broadcast_to.default, aten.column_stack.default, aten.cosine_embedding_loss.default, aten.dstack.default,
    aten.einsum.default, aten.expand_as.default, aten.hinge_embedding_loss.default, aten.hstack.default,
    aten.inner.default, aten.kron.default, aten.linalg_norm.default, aten.linalg_vecdot.default, aten.mH.default,
    aten.mT.default, aten.margin_ranking_loss.default, aten.matmul.default, aten.meshgrid.default,
    aten.meshgrid.indexing, aten.moveaxis.int, aten.moveaxis.intlist, aten.movedim.int, aten.movedim.intlist,
    aten.narrow.default, aten.outer.default, aten.pairwise_distance.default, aten.poisson_nll_loss.default,
    aten.ravel.default, aten.reshape_as.default, aten.swapaxes.default, aten.swapdims.default,
    aten.take_along_dim.default, aten.tensordot.default, aten.tile.default, aten.triplet_margin_loss.default,
    aten.view_as.default, aten.vstack.default,
}
"""Ops that torch itself writes out, so that the same kernels run."""
ATTENTION = aten.scaled_dot_product_attention.default
PARTS = {aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default}


@dataclass(frozen=True, slots=True)
class TakeApart:
    """Program -> Program, the same function, with composites that have no rule written out.

    Parts of different sizes become slices, those of `unbind` single places; equal parts stay, as they are renamings.
    In attention, keys and values that groups of heads share are repeated for each of them: what is cut are the groups.
    """

    def __call__(self, program: Program) -> Program:
        for node in [n for n in program.graph.nodes if n.op == "call_function"]:
            made = _parts_of(node)
            if made is not None:
                _replace(node, made)
            elif node.target is ATTENTION and node.kwargs.get("enable_gqa") and len(shape(node)) == 4:
                _ungroup(node)
        return program


def _parts_of(node: fx.Node) -> Any:
    """What a composite is replaced by, put before it; None where it stays."""
    if node.target in COMPOSITES and rule_of(node) is None:
        return written_out(node)
    if node.target is aten.unbind.int:
        return _places(node)
    uneven = node.target in PARTS and len({v.shape for v in node.meta["val"]}) > 1
    return _slices(node) if uneven else None


def written_out(node: fx.Node) -> Any:
    """The results of what the op of `node` is made of, put before it."""
    from autopar.passes.private import parts_of  # torch's compiler comes with it, which few programs need here
    values, made = iter(node.all_input_nodes), dict[fx.Node, fx.Node]()
    inner = parts_of(node)
    for part in inner.nodes:
        if part.op == "placeholder":
            made[part] = next(values)
        elif part.op == "call_function":
            args, kwargs = fx.map_arg((part.args, part.kwargs), lambda n: made[n])
            made[part] = emit(node, part.target, *args, **kwargs)
    return fx.map_arg(next(iter(reversed(inner.nodes))).args[0], lambda n: made[n])


def _places(node: fx.Node) -> list[fx.Node]:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return [emit(node, aten.select.int, node.args[0], dim, i) for i in range(len(node.meta["val"]))]


def _slices(node: fx.Node) -> list[fx.Node]:
    dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    ends = list(accumulate(v.shape[dim] for v in node.meta["val"]))
    return [emit(node, aten.slice.Tensor, node.args[0], dim, start, end)
            for start, end in zip([0, *ends], ends, strict=False)]


def _ungroup(node: fx.Node) -> None:
    """Give every head its own keys and values; a head's group is the outer factor of its number."""
    query, *shared = node.args[:3]
    heads = shape(query)[1]
    repeated = [x if shape(x)[1] == heads else _repeated(node, x, heads // shape(x)[1]) for x in shared]
    node.args = (query, *repeated, *node.args[3:])
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "enable_gqa"}


def _repeated(before: fx.Node, x: Any, times: int) -> fx.Node:
    """(B, G, K, D) -> (B, G times, K, D), put before a node."""
    batch, groups, length, width = shape(x)
    each = emit(before, aten.expand.default, emit(before, aten.unsqueeze.default, x, 2),
                [batch, groups, times, length, width])
    return emit(before, aten.reshape.default, each, [batch, groups * times, length, width])


def _replace(node: fx.Node, made: Any) -> None:
    """Let users of `node`, or of its numbered results, read what was `made` of it."""
    if isinstance(value_of(node), Tensor):
        node.replace_all_uses_with(made)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(made[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)
