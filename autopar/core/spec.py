"""How one tensor lies on a mesh.

Written as one `S<axes>` or `R` a dim, then the axes whose parts still have to be summed: `(P0)` for the
value itself, `(G0)` for its gradient. `S01R` shards dim 0 over axes 0 (outer) and 1 (inner); `RR(P1)` is a
partial sum over axis 1; `RR(G1)` is whole on every device while its gradient is a partial sum over axis 1,
as a weight's is when the batch is sharded over axis 1.

Seen from one axis a tensor is in one of four states, and its gradient in the dual one:

    value   sharded on d   R   P   G
    grad    sharded on d   R   R   P
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from autopar.core.errors import AutoparError

State = int | Literal["R", "P", "G"]
"""What one axis does to a tensor: the index of the dim it shards, or replicated, partial, gradient-partial."""

_SPEC = re.compile(r"((?:R|S[0-9]+)*)(?:\(P([0-9]+)\))?(?:\(G([0-9]+)\))?")


@dataclass(frozen=True, slots=True, order=True)
class Spec:
    """Sharding of one tensor: `dims[i]` are the mesh axes over dim i, outermost (lowest) first."""

    dims: tuple[tuple[int, ...], ...]
    partial: tuple[int, ...] = ()
    grad_partial: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        groups = (*self.dims, self.partial, self.grad_partial)
        axes = [axis for group in groups for axis in group]
        if len(set(axes)) != len(axes) or any(not 0 <= axis <= 9 for axis in axes):
            raise AutoparError(f"spec {self.dims} partial {self.partial}, {self.grad_partial}: every mesh axis is used "
                               "at most once and numbered 0 to 9")
        assert all(tuple(sorted(group)) == group for group in groups), f"axes out of order in {groups}"

    def __str__(self) -> str:
        text = "".join(f"S{_digits(axes)}" if axes else "R" for axes in self.dims)
        text += f"(P{_digits(self.partial)})" if self.partial else ""
        return text + (f"(G{_digits(self.grad_partial)})" if self.grad_partial else "")

    def state(self, axis: int) -> State:
        """What `axis` does to the tensor."""
        if axis in self.partial:
            return "P"
        if axis in self.grad_partial:
            return "G"
        return next((i for i, axes in enumerate(self.dims) if axis in axes), "R")

    def states(self, axes: int) -> tuple[State, ...]:
        """The states of axes 0 to `axes` - 1."""
        return tuple(self.state(axis) for axis in range(axes))

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that shard some dim."""
        return tuple(sorted(axis for axes in self.dims for axis in axes))


@lru_cache(maxsize=2**14)
def from_states(states: tuple[State, ...], rank: int) -> Spec:
    """The spec of a tensor of `rank` dims in which axis a is in `states[a]`."""
    def where(wanted: State) -> tuple[int, ...]:
        return tuple(axis for axis, state in enumerate(states) if state == wanted)
    return Spec(tuple(where(i) for i in range(rank)), where("P"), where("G"))


def parse(text: str) -> Spec:
    """Read the notation of `str(Spec)`. Raises AutoparError for anything else."""
    found = _SPEC.fullmatch(text)
    if found is None:
        raise AutoparError(f"spec {text!r} is not of the form S01R(P2): "
                           "one S<axes> or R a dim, then (P<axes>), (G<axes>)")
    dims = tuple(_axes(part[1:]) for part in re.findall(r"R|S[0-9]+", found[1]))
    spec = Spec(dims, _axes(found[2] or ""), _axes(found[3] or ""))
    if str(spec) != text:
        raise AutoparError(f"spec {text!r} is to be written {str(spec)!r}: axes ascend, the lowest is outermost")
    return spec


def _digits(axes: tuple[int, ...]) -> str:
    return "".join(map(str, axes))


def _axes(digits: str) -> tuple[int, ...]:
    return tuple(sorted(int(d) for d in digits))
