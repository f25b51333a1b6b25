"""The rule of every op: a constant, or a function of the node where ranks and arguments decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar.passes.functional import value_of
from autopar.passes.rules.losses import cross_entropy
from autopar.passes.rules.nodes import argument, shape, tensor_operands
from autopar.passes.rules.notation import Rule, letters, rule

aten = torch.ops.aten
RuleMaker = Callable[[fx.Node], Rule | None]


def pointwise(node: fx.Node) -> Rule | None:
    """Every dim passes through; operands align to the right, dims of size one broadcast."""
    out = shape(node)
    names = letters("o", len(out))
    left = [_aligned(shape(operand), out, names) for operand in tensor_operands(node)]
    return rule(f"{', '.join(left)} -> {' '.join(names)}")


def _aligned(small: tuple[int, ...], big: tuple[int, ...], names: list[str]) -> str:
    offset = len(big) - len(small)
    return " ".join(names[offset + i] if size == big[offset + i] else "1" for i, size in enumerate(small))


def _addmm(node: fx.Node) -> Rule | None:
    if len(shape(node.args[0])) != 1 or node.kwargs:
        return None
    return rule("+n, m k, k n -> m n")


def _matmul(node: fx.Node) -> Rule | None:
    left, right = shape(node.args[0]), shape(node.args[1])
    if len(right) == 2 and len(left) >= 2:
        return rule("... k, k n -> ... n")
    if len(left) == len(right) and left[:-2] == right[:-2]:
        return rule("... m k, ... k n -> ... m n")
    return None


def _convolution(node: fx.Node) -> Rule | None:
    spatial = len(shape(node)) - 2
    inner, kernel, outer = (" ".join(letters(p, spatial)) for p in "hkp")
    groups = argument(node, 6, "groups", 1)
    whole = f"{inner} {kernel} {outer}" + ("" if groups == 1 else " c o i")
    channels = "c" if groups == 1 else "i"
    return rule(f"n c {inner}, o {channels} {kernel}, +o -> n o {outer}", whole=whole)


def _embedding(node: fx.Node) -> Rule | None:
    """Ranks look up the rows of the table that they have, zeros for others.

    Not of a table of positions, whose places are known: it is small, and more ways to cut it are only more to search.
    A gradient scaled by how often an index occurs in the batch wants the whole batch, a sparse one can't be cut.
    """
    by_frequency, sparse = argument(node, 3, "scale_grad_by_freq", False), argument(node, 4, "sparse", False)
    if by_frequency or sparse:
        return None
    known = node.args[1].meta.get("constant", False)  # type: ignore[union-attr]
    return rule("v d, ... -> ... d", whole="v") if known else rule("v d, ... -> ... d", special="v")


def _layer_norm(node: fx.Node) -> Rule | None:
    normalized = " ".join(letters("d", len(node.args[1])))  # type: ignore[arg-type]
    return rule(f"... {normalized}, {normalized}, {normalized} -> ... {normalized}", whole=normalized)


def _batch_norm(node: fx.Node) -> Rule | None:
    spatial = " ".join(letters("h", len(shape(node)) - 2))
    affine = ", ".join(["c"] * sum(isinstance(a, fx.Node) for a in node.args[1:3]))
    training = bool(node.args[5])
    operands = ", ".join(part for part in (f"n c {spatial}", affine, "*, *") if part)
    return rule(f"{operands} -> n c {spatial}", whole=spatial, special="n" if training else "")


def _attention(node: fx.Node) -> Rule | None:
    query, key, value = (shape(a) for a in node.args[:3])
    if len(query) != 4 or query[1] != key[1] or key[1] != value[1]:
        return None
    mask = argument(node, 3, "attn_mask", None)
    masked = "" if mask is None else ", " + _mask_letters(shape(mask), query, key[2])
    dropout = argument(node, 4, "dropout_p", 0.0)
    return rule(f"b h q d, b h k d, b h k e{masked} -> b h q e", whole="q k d e", special="b h" if dropout else "")


def _mask_letters(mask: tuple[int, ...], query: tuple[int, ...], keys: int) -> str:
    names, sizes = ("b", "h", "q", "k"), (*query[:3], keys)
    offset = 4 - len(mask)
    return " ".join(names[offset + i] if size == sizes[offset + i] else "1" for i, size in enumerate(mask))


def _pooling(node: fx.Node) -> Rule | None:
    spatial = len(shape(node)) - 2
    before, after = (" ".join(letters(p, spatial)) for p in "hp")
    return rule(f"n c {before} -> n c {after}", whole=f"{before} {after}")


def _along(position: int, default: int = 0) -> RuleMaker:
    """An op that works along one dim (softmax, slice, cat): that dim is whole, the others pass through."""
    def make(node: fx.Node) -> Rule | None:
        out, operands = shape(node), tensor_operands(node)
        dim = argument(node, position, "dim", default) % max(len(out), 1)
        if any(len(shape(operand)) != len(out) for operand in operands):
            return None
        names = letters("o", len(out))
        along = [names[dim] if shape(operand) == out else f"x{i}" for i, operand in enumerate(operands)]
        left = [" ".join([*names[:dim], own, *names[dim + 1:]]) for own in along]
        return rule(f"{', '.join(left)} -> {' '.join(names)}", whole=" ".join([names[dim], *along]))
    return make


def _select(node: fx.Node) -> Rule | None:
    before = shape(node.args[0])
    dim = argument(node, 1, "dim", 0) % len(before)
    names = letters("o", len(before))
    return rule(f"{' '.join(names)} -> {' '.join(n for i, n in enumerate(names) if i != dim)}", whole=names[dim])


def _select_scatter(node: fx.Node) -> Rule | None:
    out = shape(node)
    dim = argument(node, 2, "dim", 0) % len(out)
    names = letters("o", len(out))
    part = " ".join(n for i, n in enumerate(names) if i != dim)
    return rule(f"{' '.join(names)}, {part} -> {' '.join(names)}", whole=names[dim])


def _roll(node: fx.Node) -> Rule | None:
    rank, dims = len(shape(node)), argument(node, 2, "dims", [])
    if not dims:
        return None
    names = letters("o", rank)
    return rule(f"{' '.join(names)} -> {' '.join(names)}", whole=" ".join(names[d % rank] for d in dims))


def _fresh(node: fx.Node) -> Rule | None:
    """Numbers drawn by global element: any part can be drawn anywhere."""
    return rule(f" -> {' '.join(letters('o', len(shape(node))))}")


def _pad(node: fx.Node) -> Rule | None:
    before, after = shape(node.args[0]), shape(node)
    names = letters("o", len(after))
    changed = {n for n, b, a in zip(names, before, after, strict=True) if a != b}
    left = " ".join("x" + n if n in changed else n for n in names)
    return rule(f"{left} -> {' '.join(names)}", whole=" ".join([*changed, *("x" + n for n in changed)]))


def _expand(node: fx.Node) -> Rule | None:
    out = shape(node)
    names = letters("o", len(out))
    return rule(f"{_aligned(shape(node.args[0]), out, names)} -> {' '.join(names)}")


def _reduction(sums: bool) -> RuleMaker:
    """A reduction over dims: a sum of shards is a partial sum, anything else wants its dims whole."""
    def make(node: fx.Node) -> Rule | None:
        before = shape(node.args[0])
        dims, keep = argument(node, 1, "dim", None), argument(node, 2, "keepdim", False)
        dims = list(range(len(before))) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
        reduced = {dim % len(before) for dim in dims}
        names = letters("o", len(before))
        after = ["1" if i in reduced else n for i, n in enumerate(names) if keep or i not in reduced]
        whole = "" if sums else " ".join(names[i] for i in reduced)
        return rule(f"{' '.join(names)} -> {' '.join(after)}", whole=whole)
    return make


def _sum_all(node: fx.Node) -> Rule | None:
    return rule(f"{' '.join(letters('i', len(shape(node.args[0]))))} ->") if not node.kwargs else None


def _einsum(node: fx.Node) -> Rule | None:
    """Its equation is its rule, unless it has dots or takes a diagonal."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    left, arrow, right = equation.partition("->")
    texts = left.split(",")
    plain = arrow and "." not in equation and all(len(set(text)) == len(text) for text in (*texts, right))
    if not plain or not isinstance(operands, (list, tuple)):
        return None
    sizes = [dict(zip(text, shape(operand), strict=True)) for text, operand in zip(texts, operands, strict=True)]
    whole = {letter for found in sizes for letter, size in found.items() if size == 1}  # may be broadcast
    return rule(f"{', '.join(map(' '.join, texts))} -> {' '.join(right)}", whole=" ".join(sorted(whole)))


RULES: dict[Any, Rule | RuleMaker] = {
    aten.linear.default: rule("... k, n k, +n -> ... n"),
    aten.mm.default: rule("m k, k n -> m n"),
    aten.bmm.default: rule("b m k, b k n -> b m n"),
    aten.addmm.default: _addmm,
    aten.matmul.default: _matmul,
    aten.einsum.default: _einsum,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.embedding.default: _embedding,
    aten.layer_norm.default: _layer_norm,
    aten.batch_norm.default: _batch_norm,
    aten.scaled_dot_product_attention.default: _attention,
    aten.cross_entropy_loss.default: cross_entropy,
    aten.max_pool2d.default: _pooling,
    aten.avg_pool2d.default: _pooling,
    aten.adaptive_avg_pool2d.default: _pooling,
    aten.softmax.int: _along(1),
    aten.log_softmax.int: _along(1),
    aten.cat.default: _along(1),
    aten.slice.Tensor: _along(1),
    aten.select.int: _select,
    aten.pad.default: _pad,
    aten.expand.default: _expand,
    aten.mean.dim: _reduction(sums=False),
    aten.amax.default: _reduction(sums=False),
    aten.sum.dim_IntList: _reduction(sums=True),
    aten.sum.default: _sum_all,
    aten.slice_scatter.default: _along(2),
    aten.select_scatter.default: _select_scatter,
    aten.roll.default: _roll,
    aten.rand.default: _fresh,
    aten.adaptive_avg_pool1d.default: _pooling,
}
CONTRACTIONS = {
    aten.linear.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.matmul.default,
    aten.conv1d.default, aten.conv2d.default,
}


UNTAGGED_POINTWISE = {
    aten.to.dtype, aten.dropout.default, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
    aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten.__and__.Scalar, aten.__or__.Scalar,
}
"""Pointwise ops that torch does not tag as such."""


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result depends on one element of each operand; torch's own tag decides."""
    tagged = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return node.target in UNTAGGED_POINTWISE or (tagged and value_of(node) is not None)


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of the op that `node` calls; None: no rule, it runs replicated."""
    if value_of(node) is None:
        return None
    found = RULES.get(node.target)
    if isinstance(found, Rule):
        return found
    if found is not None:
        return found(node)
    return pointwise(node) if is_pointwise(node) and tensor_operands(node) else None
