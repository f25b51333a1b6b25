"""Local shapes of values under specs, and specs carried through renamings."""

from __future__ import annotations

import math

from torch import fx

from autopar.core.mesh import Mesh
from autopar.core.spec import Spec, State
from autopar.passes.factors import Factored
from autopar.passes.functional import value_of
from autopar.passes.ops import OpOperand


def local_factors(factored: Factored, node: fx.Node, spec: Spec, mesh: Mesh) -> tuple[int, ...]:
    """The sizes of the flat factors of `node` on one device; `spec` is over flat factors."""
    return tuple(size // mesh.extent(axes) for size, axes in zip(factored.refined(node), spec.dims, strict=True))


def local_shape(factored: Factored, node: fx.Node, spec: Spec, mesh: Mesh) -> tuple[int, ...]:
    """The shape of `node` on one device."""
    sizes = iter(local_factors(factored, node, spec, mesh))
    return tuple(math.prod(next(sizes) for _ in dim) for dim in factored.dims[node])


def local_bytes(factored: Factored, node: fx.Node, spec: Spec, mesh: Mesh) -> float:
    """Bytes of `node` on one device."""
    return math.prod(local_factors(factored, node, spec, mesh)) * itemsize(node)


def whole_bytes(factored: Factored, node: fx.Node) -> float:
    """Bytes of the whole of `node`."""
    return math.prod(factored.refined(node)) * itemsize(node)


def itemsize(node: fx.Node) -> int:
    """Bytes an element of `node`."""
    value = value_of(node)
    assert value is not None
    return value.dtype.itemsize


def to_base(spec: Spec, index: tuple[int, ...], rank: int) -> Spec:
    """The spec of the base value such that its renaming, whose flat factor i is the base's `index[i]`, has `spec`."""
    dims: list[tuple[int, ...]] = [()] * rank
    for axes, place in zip(spec.dims, index, strict=True):
        dims[place] = axes
    return Spec(tuple(dims), spec.partial, spec.grad_partial)


def from_base(spec: Spec, index: tuple[int, ...]) -> Spec:
    """The spec of a renaming of a value in `spec`."""
    return Spec(tuple(spec.dims[i] for i in index), spec.partial, spec.grad_partial)


def carried(states: dict[str, State], place: dict[int, int]) -> dict[str, State]:
    """States over the flat factors of one value, each for some key, as those over another's, whose flat factor
    `place[i]` is factor i of the first; `R` where it has none."""
    return {key: place.get(state, "R") if isinstance(state, int) else state for key, state in states.items()}


def based(factored: Factored, operand: OpOperand) -> OpOperand:
    """The operand with its keys on the value that it renames; factors it does not have get the empty key."""
    base, index = factored.base(operand.node)
    if operand.keys is None:
        return OpOperand(base, None, operand.additive)
    keys = [""] * len(factored.flat(base))
    for key, place in zip(operand.keys, index, strict=True):
        keys[place] = key
    return OpOperand(base, tuple(keys), operand.additive)
