"""The strategies of an op: every assignment of mesh axes to its factors that its rule and the mode allow.

An axis is assigned a factor, or `R` (every device does the same work, gradients whole), or `G` (the same work,
gradients partial sums: what an op that never meets the batch does while the batch is sharded elsewhere).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from torch import fx

from autopar.core.mesh import Mesh
from autopar.core.spec import Spec, State, from_states
from autopar.passes.factors import Factored
from autopar.passes.functional import value_of
from autopar.passes.modes import AxisMode, Mode, Part
from autopar.passes.ops import Op, OpOperand

Assignment = tuple[str, ...]
"""For each axis the key of a factor, or `R`, or `G`."""
_IDLE = ("R", "G")


def differentiable(factored: Factored) -> frozenset[fx.Node]:
    """The values a gradient flows to: floats and complex numbers that depend on a parameter, in a training program."""
    found: set[fx.Node] = set()
    if not factored.program.training:
        return frozenset()
    for node in factored.program.graph.nodes:
        value = value_of(node)
        if node.op == "placeholder":
            source = factored.program.sources[node.name]
            if source.kind == "parameter" and value is not None and value.requires_grad:
                found.add(node)
        elif any(n in found for n in node.all_input_nodes) and (
                value is None or value.is_floating_point() or value.is_complex()):
            found.add(node)
    return frozenset(found)


def assignments(op: Op, mesh: Mesh, mode: Mode, gradients: bool) -> list[Assignment]:
    """All assignments; `gradients` tells whether a gradient flows through the op."""
    axes = mode.on(mesh.shape)
    parts = mesh.extent(tuple(a for a, axis in enumerate(axes) if axis.batch_always))
    batch = [f.key for f in op.factors if f.role == "batch" and f.shardable and f.size % parts == 0]
    idle = [*_IDLE] if gradients and not any(f.role == "batch" for f in op.factors) else ["R"]
    options = [batch[:1] if axis.batch_always and batch else [*_keys_for(op, axis), *idle] for axis in axes]
    sizes = {f.key: f.size for f in op.factors}
    return [found for found in itertools.product(*options) if _fits(sizes, found, mesh)]


def _keys_for(op: Op, axis: AxisMode) -> list[str]:
    """The factors of `op` that an axis may shard."""
    keys = [f.key for f in op.factors if f.shardable and f.role in axis.roles]
    if axis.part is None or not op.contraction:
        return keys
    return [key for key in keys if part_of(op, key) == axis.part]


def part_of(op: Op, key: str) -> Part:
    """What a factor is to a contraction: among the rows or columns of its result, or summed over."""
    left, _ = [o for o in op.operands if not o.additive][:2]
    if op.factor(key).summed:
        return "inner"
    return "rows" if key in (left.keys or ()) else "columns"


def _fits(sizes: dict[str, int], assignment: Assignment, mesh: Mesh) -> bool:
    """Whether every factor divides into its parts."""
    return all(sizes[key] % parts == 0 for key, parts in factor_parts(assignment, mesh).items())


def factor_parts(assignment: Assignment, mesh: Mesh) -> dict[str, int]:
    """Into how many parts each factor is cut that an axis is assigned."""
    found: dict[str, int] = {}
    for key, size in zip(assignment, mesh.shape, strict=True):
        if key not in _IDLE:
            found[key] = found.get(key, 1) * size
    return found


def axes_of(assignment: Assignment, key: str) -> tuple[int, ...]:
    """The axes assigned to factor `key`."""
    return tuple(axis for axis, assigned in enumerate(assignment) if assigned == key)


def operand_spec(op: Op, operand: OpOperand, assignment: Assignment, gradient: bool, rank: int) -> Spec:
    """The spec `operand` must have, over its flat factors; `gradient` tells whether one flows to it."""
    states = tuple(_operand_state(op, operand, key, gradient) for key in assignment)
    return from_states(states, rank)


def operand_states(op: Op, operand: OpOperand, gradient: bool) -> dict[str, State]:
    """What an axis must do to `operand`, by what it is assigned."""
    return {key: _operand_state(op, operand, key, gradient) for key in _assignable(op)}


def result_states(op: Op, result: OpOperand, gradient: bool) -> dict[str, State]:
    """What an axis does to `result`, by what it is assigned."""
    return {key: _result_state(result, key, gradient) for key in _assignable(op)}


def _assignable(op: Op) -> list[str]:
    return [*(f.key for f in op.factors if f.shardable), *_IDLE]


def _operand_state(op: Op, operand: OpOperand, key: str, gradient: bool) -> State:
    if key == "R" or operand.keys is None:
        return "G" if key == "G" and gradient else "R"
    if key in operand.keys:
        return operand.keys.index(key)
    if key != "G" and operand.additive and op.factor(key).summed:
        return "P"
    return "G" if gradient else "R"


def result_spec(op: Op, result: OpOperand, assignment: Assignment, gradient: bool, rank: int) -> Spec:
    """The spec in which `result` comes out, over its flat factors."""
    states = tuple(_result_state(result, key, gradient) for key in assignment)
    return from_states(states, rank)


def _result_state(result: OpOperand, key: str, gradient: bool) -> State:
    if key == "R" or (key == "G" and not gradient):
        return "R"
    if key == "G":
        return "G"
    assert result.keys is not None
    return result.keys.index(key) if key in result.keys else "P"


@dataclass(frozen=True, slots=True)
class Storage:
    """How a parameter rests: per axis `R`, `Z`, `K`, or the flat factor it is sharded on as it is used.

    `Z` is sharded at rest and gathered for each use, `K` gathered for the forward and kept until the backward.
    """

    states: tuple[int | str, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.states))

    @property
    def gathered(self) -> tuple[int, ...]:
        """The axes over which it is sharded at rest and gathered for use."""
        return tuple(axis for axis, state in enumerate(self.states) if state in ("Z", "K"))

    @property
    def kept(self) -> bool:
        """Whether what is gathered for the forward is kept for the backward."""
        return "K" in self.states

    def resting_parts(self, mesh: Mesh) -> int:
        """Into how many parts it is cut at rest."""
        return math.prod(size for size, state in zip(mesh.shape, self.states, strict=True) if state != "R")

    def spec(self, rank: int, trained: bool) -> Spec:
        """The spec of the gathered parameter of `rank` flat factors: what was gathered has its gradient summed."""
        return from_states(self.used(trained), rank)

    def used(self, trained: bool) -> tuple[State, ...]:
        """What each axis does to the gathered parameter."""
        gathered: State = "G" if trained else "R"
        resting: dict[int | str, State] = {"Z": gathered, "K": gathered, "R": "R"}
        return tuple(s if isinstance(s, int) else resting[s] for s in self.states)


def parse_storage(text: str) -> Storage:
    """The inverse of `str(Storage)`."""
    return Storage(tuple(int(part) if part.isdigit() else part for part in text.split(",")))


def storage_dims(factored: Factored, node: fx.Node) -> tuple[tuple[int, ...], ...]:
    """The dims a parameter is stored in, as positions of its flat factors.

    A dim of a matrix whose leading factors only number the parts of a split is stored unflattened, so that the
    factor behind them is sharded plainly: GPT-2's (768, 3·heads·dim) rests as (768, 3, heads·dim). Where shapes are
    kept no dim is, and what would be cut in it by a factor further in rests otherwise.
    """
    stored: list[tuple[int, ...]] = []
    place = 0
    for dim in factored.dims[node]:
        positions = tuple(range(place, place + len(dim)))
        place += len(dim)
        leading = sum(1 for _ in itertools.takewhile(lambda f: f in factored.selected, dim))
        unflattened = len(factored.dims[node]) > 1 and 0 < leading < len(dim) and factored.program.stored != "plain"
        stored += [positions[:leading], positions[leading:]] if unflattened else [positions]
    return tuple(stored)


def storages(factored: Factored, node: fx.Node, users: list[tuple[Op, OpOperand]], mesh: Mesh,
             mode: Mode) -> list[Storage]:
    """All ways the parameter `node` may rest under `mode`; whole where no other way is possible."""
    dims, sizes = storage_dims(factored, node), factored.refined(node)
    leading = [dim[0] for dim in dims if dim and factored.flat(node)[dim[0]] not in factored.selected]
    options = [_options(axis, [i for i in leading if _used(users, i, axis)]) for axis in mode.on(mesh.shape)]
    found = [Storage(states) for states in itertools.product(*options)]
    return [s for s in found if _rests(s, dims, sizes, mesh)] or [Storage(("R",) * len(mesh.shape))]


def _options(axis: AxisMode, factors: list[int]) -> list[int | str]:
    whole: list[int | str] = [state for state in ("R", "Z", "K") if state in axis.storage]
    return [*whole, *(factors if "S" in axis.storage else [])]


def _used(users: list[tuple[Op, OpOperand]], place: int, axis: AxisMode) -> bool:
    """Whether some op may shard flat factor `place` of its parameter on such an axis."""
    keyed = ((op, operand.keys[place]) for op, operand in users if operand.keys)
    return any(key and op.factor(key).shardable and op.factor(key).role in axis.roles for op, key in keyed)


def _rests(storage: Storage, dims: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], mesh: Mesh) -> bool:
    """Whether parts are even and there is a dim left to gather; what is gathered is all kept or all not."""
    cut = {s for s in storage.states if isinstance(s, int)}
    even = all(sizes[i] % mesh.extent(tuple(a for a, s in enumerate(storage.states) if s == i)) == 0 for i in cut)
    alike = not {"Z", "K"} <= set(storage.states)
    return even and alike and not (storage.gathered and gather_dim(dims, sizes, storage, mesh) is None)


def gather_dim(dims: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], storage: Storage, mesh: Mesh) -> int | None:
    """The stored dim that is cut over the gathered axes: one that is whole otherwise and divides evenly.

    Failing that the first, in uneven parts; None where that is taken. A scalar can't be cut.
    """
    free = [d for d, dim in enumerate(dims) if not any(state in dim for state in storage.states)]
    parts = mesh.extent(storage.gathered)
    even = [d for d in free if math.prod(sizes[i] for i in dims[d]) % parts == 0]
    return next(iter(even), 0 if 0 in free else None)


