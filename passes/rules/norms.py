"""Rules of norms: what statistics are taken over is whole, unless something brings them together."""

from __future__ import annotations

from torch import fx

from autopar.passes.rules.nodes import argument, joined, named, operand_shape, shape, tensor_operands
from autopar.passes.rules.notation import Rule, letters, rule


def layer_norm(node: fx.Node) -> Rule | None:
    """Layer norm and RMS norm: the last dims are whole."""
    normalized = joined(letters("d", len(named(node, "normalized_shape"))))
    return rule(f"... {normalized}, {normalized}, {normalized} -> ... {normalized}", whole=normalized)


def group_norm(node: fx.Node) -> Rule | None:
    """Statistics are a sample's and a group's of channels."""
    spatial = joined(letters("h", len(shape(node)) - 2))
    return rule(f"n c {spatial}, c, c -> n c {spatial}", whole=f"c {spatial}")


def instance_norm(node: fx.Node) -> Rule | None:
    """Statistics are a sample's and a channel's; running ones are not carried on."""
    spatial = joined(letters("h", len(shape(node)) - 2))
    running = argument(node, 3, "running_mean") is not None
    return None if running else rule(f"n c {spatial}, c, c -> n c {spatial}", whole=spatial)


def batch_norm(node: fx.Node) -> Rule | None:
    """Statistics over a sharded batch are brought together."""
    spatial = joined(letters("h", len(shape(node)) - 2))
    affine = ", ".join(["c"] * sum(isinstance(a, fx.Node) for a in node.args[1:3]))
    operands = ", ".join(part for part in (f"n c {spatial}", affine, "*, *") if part)
    return rule(f"{operands} -> n c {spatial}", whole=spatial, special="n" if bool(node.args[5]) else "")


def weight_norm(node: fx.Node) -> Rule | None:
    """A weight as a length for each place of one dim, times a direction whose other dims are whole."""
    rank, dim = len(operand_shape(node)), named(node, "dim")
    if dim < 0:
        return None
    names = letters("o", rank)
    length = joined([n if i == dim else "1" for i, n in enumerate(names)])
    whole = joined([n for i, n in enumerate(names) if i != dim])
    return rule(f"{joined(names)}, {length} -> {joined(names)}", whole=whole)


def prelu(node: fx.Node) -> Rule | None:
    """A slope for each channel, or one for all."""
    names, slopes = letters("o", len(shape(node))), shape(tensor_operands(node)[1])
    each = slopes and slopes[0] > 1
    slope = (names[1] if each else "1") if slopes else ""
    return rule(f"{joined(names)}, {slope} -> {joined(names)}")
