"""The rule of every op: a constant, or a function of the node where ranks and arguments decide."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.passes.functional import value_of
from autopar.passes.own_ops import LINEAR_CROSS_ENTROPY
from autopar.passes.rules import losses, moves, norms, reductions
from autopar.passes.rules.nodes import RuleMaker, argument, attention_dropout, call_of, shape, tensor_operands
from autopar.passes.rules.notation import Rule, letters, rule
from autopar.passes.rules.recurrent import recurrent

aten = torch.ops.aten


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


def _transposed_convolution(node: fx.Node) -> Rule | None:
    spatial = len(shape(node)) - 2
    inner, kernel, outer = (" ".join(letters(p, spatial)) for p in "hkp")
    groups = argument(node, 6, "groups", 1)
    whole = f"{inner} {kernel} {outer}" + ("" if groups == 1 else " c o i")
    channels = "o" if groups == 1 else "i"
    return rule(f"n c {inner}, c {channels} {kernel}, +o -> n o {outer}", whole=whole)


def _baddbmm(node: fx.Node) -> Rule | None:
    """What is added is broadcast to the products."""
    return rule(f"+{moves.aligned(shape(node.args[0]), shape(node), ['b', 'm', 'n'])}, b m k, b k n -> b m n")


def _cdist(node: fx.Node) -> Rule | None:
    left, right = shape(node.args[0]), shape(node.args[1])
    return rule("... p m, ... r m -> ... p r", whole="m") if left[:-2] == right[:-2] else None


def _embedding_bag(node: fx.Node) -> Rule | None:
    """Bags are runs of indices, so only columns are cut; of the results, those that are told about bags are not."""
    call, of_rows = call_of(node), argument(node, 3, "scale_grad_by_freq", False) or argument(node, 5, "sparse", False)
    if of_rows or node.args[1] != 0:
        return None
    weights = ", i" if len(tensor_operands(call)) > 3 else ""
    return rule(f"v d, i, a{weights} -> b d", whole="v i a b")


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


def _attention(node: fx.Node) -> Rule | None:
    query, key, value = (shape(a) for a in node.args[:3])
    if len(query) != 4 or query[1] != key[1] or key[1] != value[1]:
        return None
    mask = argument(node, 3, "attn_mask", None)
    masked = "" if mask is None else ", " + _mask_letters(shape(mask), query, key[2])
    dropout = attention_dropout(node)
    return rule(f"b h q d, b h k d, b h k e{masked} -> b h q e", whole="q k d e", special="b h" if dropout else "")


def _mask_letters(mask: tuple[int, ...], query: tuple[int, ...], keys: int) -> str:
    names, sizes = ("b", "h", "q", "k"), (*query[:3], keys)
    offset = 4 - len(mask)
    return " ".join(names[offset + i] if size == sizes[offset + i] else "1" for i, size in enumerate(mask))


def _pooling(node: fx.Node) -> Rule | None:
    spatial = len(shape(node)) - 2
    before, after = (" ".join(letters(p, spatial)) for p in "hp")
    return rule(f"n c {before} -> n c {after}", whole=f"{before} {after}")


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
    aten.mv.default: rule("m k, k -> m"),
    aten.dot.default: rule("k, k ->"),
    aten.vdot.default: rule("k, k ->"),
    aten.bmm.default: rule("b m k, b k n -> b m n"),
    aten.baddbmm.default: _baddbmm,
    aten.addmm.default: _addmm,
    aten.matmul.default: _matmul,
    aten.einsum.default: _einsum,
    aten.bilinear.default: rule("... a, ... b, o a b, +o -> ... o"),
    aten.cdist.default: _cdist,
    aten.embedding.default: _embedding,
    aten.embedding_bag.padding_idx: _embedding_bag,
    aten.scaled_dot_product_attention.default: _attention,
    aten.batch_norm.default: norms.batch_norm,
    aten.group_norm.default: norms.group_norm,
    aten.instance_norm.default: norms.instance_norm,
    aten.layer_norm.default: norms.layer_norm,
    aten.rms_norm.default: norms.layer_norm,
    aten._weight_norm.default: norms.weight_norm,
    aten.prelu.default: norms.prelu,
    aten.lstm.input: recurrent,
    aten.gru.input: recurrent,
    aten.rnn_tanh.input: recurrent,
    aten.rnn_relu.input: recurrent,
    aten.cross_entropy_loss.default: losses.cross_entropy,
    aten.nll_loss_nd.default: losses.nll,
    LINEAR_CROSS_ENTROPY: losses.linear_cross_entropy,
    **dict.fromkeys(losses.POINTWISE, losses.pointwise_loss),
    **dict.fromkeys((
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    ), _convolution),
    **dict.fromkeys((
        aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    ), _transposed_convolution),
    **dict.fromkeys((
        aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
        aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
        aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
        aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.max_pool2d_with_indices.default,
        aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
        aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec,
        aten.upsample_bicubic2d.vec,
    ), _pooling),
    aten.grid_sampler.default: rule("n c h w, n p q x -> n c p q", whole="h w x"),
    aten.im2col.default: rule("n c h w -> n k l", whole="c h w k l"),
    aten.col2im.default: rule("n k l -> n c h w", whole="k l c h w"),
    aten.pixel_shuffle.default: moves.last(3, 3),
    aten.pixel_unshuffle.default: moves.last(3, 3),
    **dict.fromkeys((aten.tril.default, aten.triu.default), rule("... i j -> ... i j", whole="i j")),
    **dict.fromkeys((
        aten.softmax.int, aten.log_softmax.int, aten.cat.default, aten.slice.Tensor, aten.slice_scatter.default,
        aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default, aten.cummax.default, aten.cummin.default,
        aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable, aten.topk.default,
        aten.glu.default, aten.diff.default, aten.repeat_interleave.self_int,
    ), moves.along),
    **dict.fromkeys((aten.roll.default, aten.flip.default), moves.within),
    **dict.fromkeys((aten.pad.default, aten.repeat.default), moves.resized),
    aten.expand.default: moves.expand,
    aten.select.int: moves.select,
    aten.select_scatter.default: moves.select_scatter,
    aten.stack.default: moves.stack,
    aten.rand.default: moves.fresh,
    aten.one_hot.default: moves.one_hot,
    aten.index.Tensor: moves.index,
    aten.index_select.default: moves.index_select,
    aten.gather.default: moves.gather,
    **dict.fromkeys((
        aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two,
    ), moves.scatter),
    **dict.fromkeys((aten.index_add.default, aten.index_copy.default), moves.index_put_along),
    **dict.fromkeys((aten.bucketize.Tensor,), moves.bucketize),
    **dict.fromkeys((
        aten.mean.dim, aten.amax.default, aten.amin.default, aten.logsumexp.default, aten.linalg_vector_norm.default,
        aten.norm.ScalarOpt_dim, aten.prod.dim_int, aten.var.dim, aten.var.correction, aten.std.dim,
        aten.std.correction, aten.var_mean.dim, aten.var_mean.correction, aten.std_mean.dim, aten.std_mean.correction,
        aten.any.dim, aten.all.dim, aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim,
        aten.median.dim, aten.kthvalue.default,
    ), reductions.reduced),
    aten.cosine_similarity.default: reductions.compared,
    aten.sum.dim_IntList: reductions.summed,
    aten.sum.default: reductions.sum_all,
}
CONTRACTIONS = {
    aten.linear.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.matmul.default,
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
}


UNTAGGED_POINTWISE = {
    aten.to.dtype, aten.dropout.default, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
    aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten.__and__.Scalar, aten.__or__.Scalar,
    aten.log_sigmoid.default, aten.masked_fill.Tensor, aten.empty_like.default, aten.zeros_like.default,
    aten.ones_like.default, aten.full_like.default, aten.fill.Scalar,
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
    found = RULES.get(call_of(node).target)
    if isinstance(found, Rule):
        return found
    if found is not None:
        return found(node)
    return moves.pointwise(node) if is_pointwise(node) and tensor_operands(node) else None
