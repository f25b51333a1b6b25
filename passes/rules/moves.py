"""Rules of ops that move elements: a dim that they work along is whole, the others pass through."""

from __future__ import annotations

import torch
from torch import fx

from autopar.passes.functional import value_of
from autopar.passes.rules.nodes import (
    RuleMaker,
    dims_of,
    joined,
    named,
    names_of,
    operand_shape,
    shape,
    tensor_operands,
)
from autopar.passes.rules.notation import Rule, rule

_PLACES = (torch.int64, torch.int32)
"""What places are told in; a mask makes as many as it is true for."""


def pointwise(node: fx.Node) -> Rule | None:
    """Every dim passes through; operands align to the right, dims of size one broadcast."""
    out = shape(node)
    names = names_of(len(out))
    left = [aligned(shape(operand), out, names) for operand in tensor_operands(node)]
    return rule(f"{', '.join(left)} -> {joined(names)}")


def aligned(small: tuple[int, ...], big: tuple[int, ...], names: list[str]) -> str:
    """The letters of an operand that is broadcast to a result of shape `big` with letters `names`."""
    offset = len(big) - len(small)
    return joined([names[offset + i] if size == big[offset + i] else "1" for i, size in enumerate(small)])


def along(node: fx.Node) -> Rule | None:
    """Ops that work along one dim, which may get another size (softmax, slice, cat, sort)."""
    out, operands, dim = shape(node), tensor_operands(node), named(node, "dim")
    if dim is None or not out or any(len(shape(operand)) != len(out) for operand in operands):
        return None
    dim, names = dim % len(out), names_of(len(out))
    own = [names[dim] if shape(operand) == out else f"x{i}" for i, operand in enumerate(operands)]
    left = [joined([*names[:dim], letter, *names[dim + 1:]]) for letter in own]
    return rule(f"{', '.join(left)} -> {joined(names)}", whole=joined([names[dim], *own]))


def within(node: fx.Node) -> Rule | None:
    """Ops that move elements along some dims, which keep their sizes (roll, flip)."""
    names, dims = names_of(len(shape(node))), named(node, "dims")
    whole = joined([names[d] for d in dims_of(dims, len(names))])
    return rule(f"{joined(names)} -> {joined(names)}", whole=whole) if dims else None


def last(count: int, after: int) -> RuleMaker:
    """Ops that make `after` dims of the last `count`; the others pass through."""
    def make(_: fx.Node) -> Rule | None:
        before, made = [f"x{i}" for i in range(count)], [f"y{i}" for i in range(after)]
        return rule(f"... {joined(before)} -> ... {joined(made)}", whole=joined([*before, *made]))
    return make


def select(node: fx.Node) -> Rule | None:
    """One place of a dim."""
    before = operand_shape(node)
    dim = named(node, "dim") % len(before)
    names = names_of(len(before))
    return rule(f"{joined(names)} -> {joined([n for i, n in enumerate(names) if i != dim])}", whole=names[dim])


def select_scatter(node: fx.Node) -> Rule | None:
    """A value with one place of a dim replaced."""
    out = shape(node)
    dim = named(node, "dim") % len(out)
    names = names_of(len(out))
    part = joined([n for i, n in enumerate(names) if i != dim])
    return rule(f"{joined(names)}, {part} -> {joined(names)}", whole=names[dim])


def stack(node: fx.Node) -> Rule | None:
    """Tensors of one shape along a new dim, which is whole."""
    names = names_of(len(shape(node)))
    dim = named(node, "dim") % len(names)
    part = joined([n for i, n in enumerate(names) if i != dim])
    return rule(f"{', '.join([part] * len(tensor_operands(node)))} -> {joined(names)}", whole=names[dim])


def fresh(node: fx.Node) -> Rule | None:
    """Numbers drawn by global element: any part can be drawn anywhere."""
    return rule(f" -> {joined(names_of(len(shape(node))))}")


def resized(node: fx.Node) -> Rule | None:
    """Ops of one tensor that change the sizes of some dims, which are whole, and leave the others (pad, repeat)."""
    out, small = shape(node), operand_shape(node)
    before = (1,) * (len(out) - len(small)) + small
    names = names_of(len(out))
    changed = {n for n, b, a in zip(names, before, out, strict=True) if a != b}
    left = ["x" + n if n in changed else n for n in names][len(out) - len(small):]
    return rule(f"{joined(left)} -> {joined(names)}", whole=joined([*sorted(changed), *("x" + n for n in changed)]))


def expand(node: fx.Node) -> Rule | None:
    """Dims of size one broadcast."""
    out = shape(node)
    names = names_of(len(out))
    return rule(f"{aligned(operand_shape(node), out, names)} -> {joined(names)}")


# Lookups

def index_select(node: fx.Node) -> Rule | None:
    """Places of one dim, which is whole; they may be cut themselves."""
    names = names_of(len(shape(node)))
    dim = named(node, "dim") % max(len(names), 1)
    if not names or not operand_shape(node, 2):
        return None
    return rule(f"{joined([*names[:dim], 'x', *names[dim + 1:]])}, {names[dim]} -> {joined(names)}", whole="x")


def index(node: fx.Node) -> Rule | None:
    """Places of some dims, which are whole; the places' own dims pass through, in front of all others unless the
    indexed dims stand side by side."""
    before, given = operand_shape(node), list(named(node, "indices"))
    at = [i for i, places in enumerate(given) if places is not None]
    if any(value.dtype not in _PLACES for value in map(value_of, (given[i] for i in at)) if value is not None):
        return None
    wide = len(shape(node)) - (len(before) - len(at))
    start = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    names = names_of(len(shape(node)))
    places, rest = names[start:start + wide], iter(names[:start] + names[start + wide:])
    left = [f"x{i}" if i in at else next(rest) for i in range(len(before))]
    sizes = shape(node)[start:start + wide]
    read = [aligned(shape(given[i]), sizes, places) for i in at]
    return rule(f"{joined(left)}, {', '.join(read)} -> {joined(names)}", whole=joined([f"x{i}" for i in at]))


def gather(node: fx.Node) -> Rule | None:
    """The dim that is looked along is whole, places may be cut; so may dims of which all places are taken."""
    before, out, dim = operand_shape(node), shape(node), named(node, "dim")
    if not out:
        return None
    names, dim = names_of(len(out)), dim % len(out)
    same = [i != dim and b == o for i, (b, o) in enumerate(zip(before, out, strict=True))]
    left = [n if alike else f"x{i}" for i, (n, alike) in enumerate(zip(names, same, strict=True))]
    cut_short = [names[i] for i, alike in enumerate(same) if not alike and i != dim]
    return rule(f"{joined(left)}, {joined(names)} -> {joined(names)}",
                whole=joined([*(n for n in left if n not in names), *cut_short]))


def scatter(node: fx.Node) -> Rule | None:
    """The dim that is written along is whole, and so are dims of which not all places are written."""
    out, dim = shape(node), named(node, "dim")
    if not out:
        return None
    names, dim = names_of(len(out)), dim % len(out)
    given = [shape(n) for n in tensor_operands(node)]
    free = [i != dim and all(len(s) == len(out) and s[i] == out[i] for s in given) for i in range(len(out))]
    left = [joined([n if free[i] else f"{'xyz'[k]}{i}" for i, n in enumerate(names)]) for k in range(1, len(given))]
    whole = {letter for text in [joined(names), *left] for letter in text.split()}
    return rule(f"{', '.join([joined(names), *left])} -> {joined(names)}",
                whole=joined(sorted(whole - {n for i, n in enumerate(names) if free[i]})))


def index_put_along(node: fx.Node) -> Rule | None:
    """`index_add` and `index_copy`: as many slices of a dim, which is whole, as there are places."""
    names = names_of(len(shape(node)))
    if not names:
        return None
    dim = named(node, "dim") % len(names)
    slices = joined([*names[:dim], "x", *names[dim + 1:]])
    return rule(f"{joined(names)}, x, {slices} -> {joined(names)}", whole=f"x {names[dim]}")


def bucketize(node: fx.Node) -> Rule | None:
    """Each element's place among boundaries, which are whole."""
    names = joined(names_of(len(shape(node))))
    return rule(f"{names}, b -> {names}", whole="b")


def one_hot(node: fx.Node) -> Rule | None:
    """A new last dim, which is whole."""
    names = names_of(len(shape(node)))
    return rule(f"{joined(names[:-1])} -> {joined(names)}", whole=names[-1])
