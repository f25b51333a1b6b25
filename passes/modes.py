"""Modes: restrictions of the space of strategies, axis by axis.

    mode       mesh        an axis may
    ddp        (d)         cut the batch; parameters rest whole
    zero1      (d)         ddp's compute, optimizer state sharded; the same as zero2, see below
    zero2      (d)         cut the batch; parameters and optimizer state rest sharded, kept whole from use to use
    zero3      (d)         cut the batch; parameters rest sharded and are gathered again in the backward
    1d         (t)         cut parameters and what is made of them
    sequence   (t)         cut parameters and, between them, the inputs' other dims
    zero+1d    (d, t)      zero3 on axis 0, 1d on axis 1
    2d         (q, q)      cut rows of every matmul on axis 0 and its columns on axis 1, weights S0S1 at rest
    2.5d       (d, q, q)   the batch on axis 0, 2d on axes 1 and 2, weights replicated over 0
    3d         (q, q, q)   rows, columns and the summed dim of every matmul, weights over all three at rest
    auto       any         everything

    pp         stages of consecutive segments, each on devices of its own, which cut the batch as ddp does
    pp+zero    the same; in a stage as zero2
    pp1d       in a stage parameters rest whole over axis 0, which cuts the batch, and are cut as in 1d over axis 1
    pp2d, pp2.5d, pp3d, pp+sequence   in a stage as the mode they are named after

ZeRO-1 shards the optimizer's state alone, so that each rank holds whole gradients after their sum. Here parameters
rest as DTensors and their gradients are summed straight to the owner of a shard, which moves no more bytes and holds
fewer: a plan for zero1 runs exactly as one for zero2.

Sources: Megatron-LM (1d), Korthikanti et al. 2022 (sequence), Rajbhandari et al. 2020 (ZeRO), Xu et al. 2021 (2d),
Wang et al. 2021 (2.5d), Bian et al. 2021 (3d).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from autopar.core.errors import AutoparError, UnknownName
from autopar.core.mesh import mesh_shapes

Role = Literal["batch", "data", "model"]
Part = Literal["rows", "columns", "inner"]
Shape = tuple[int, ...]
MOST_AXES = 4


@dataclass(frozen=True, slots=True)
class AxisMode:
    """What one axis may do: roles of the factors it shards, whether it must shard the batch wherever there is one.

    `storage` are the ways a parameter may rest: `R` whole, `Z` gathered for each use, `K` gathered and kept, `S`
    sharded as it is used. `part` is the only part of a contraction that the axis may shard, None for any.
    """

    roles: frozenset[Role]
    storage: frozenset[str]
    batch_always: bool = False
    part: Part | None = None


MOST_WITH_THREE = 3
"""The most meshes of three axes that auto searches; more take it longer than what a third axis gains is worth."""
_EVERY: frozenset[Role] = frozenset(("batch", "data", "model"))
_BATCH: frozenset[Role] = frozenset(("batch",))
_MODEL: frozenset[Role] = frozenset(("model",))
_FREE = AxisMode(_EVERY, frozenset("RZKS"))
_TENSOR = AxisMode(_MODEL, frozenset("RS"))


def _data(storage: str) -> AxisMode:
    return AxisMode(_BATCH, frozenset(storage), batch_always=True)


def _matmul(part: Part, storage: str = "ZS") -> AxisMode:
    roles = frozenset({"batch", "data"}) if part == "rows" else _MODEL
    return AxisMode(roles, frozenset(storage), batch_always=part == "rows", part=part)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Mode:
    """The axes of a mode, or one kind of axis for any number; which mesh shapes it searches, and that in words."""

    name: str
    axes: tuple[AxisMode, ...]
    shapes: Callable[[int], tuple[Shape, ...]]
    wants: str
    staged: bool = False

    def on(self, shape: Shape) -> tuple[AxisMode, ...]:
        """What each axis of a mesh may do; a mode of one axis takes several of its kind.

        Raises AutoparError for a mesh that the mode does not take, or one of more than MOST_AXES.
        """
        if len(shape) > MOST_AXES:
            raise AutoparError(f"mesh {_text(shape)} has {len(shape)} axes, a mesh has 1 to {MOST_AXES}; join some, "
                               f"such as {_text((math.prod(shape[:-1]), shape[-1]))}")
        if len(self.axes) == 1:
            return self.axes * len(shape)
        devices = math.prod(shape)
        fitting = self.shapes(devices)
        if shape not in fitting:
            instead = f"mesh {_either(fitting)}" if fitting else self._near(devices)
            raise AutoparError(f"mode {self.name} wants {self.wants}, not a mesh {_text(shape)} of {devices}; use "
                               f"{instead}, or another mode")
        return self.axes

    def shapes_for(self, devices: int) -> tuple[Shape, ...]:
        """The mesh shapes to try on so many devices. Raises AutoparError when there is none."""
        found = self.shapes(devices)
        if not found:
            raise AutoparError(f"mode {self.name} wants {self.wants}, the cluster has {devices}; use "
                               f"{self._near(devices)}, or another mode")
        return found

    def _near(self, devices: int) -> str:
        """The numbers of devices next below and above that the mode takes, with a mesh for each."""
        # The next cube is less than eight times as far.
        near = [next((n for n in numbers if self.shapes(n)), None)
                for numbers in (range(devices - 1, 1, -1), range(devices + 1, 8 * devices + 1))]
        return " or ".join(f"{n} devices ({_either(self.shapes(n))})" for n in near if n is not None)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _either(shapes: tuple[Shape, ...]) -> str:
    return " or ".join(map(_text, shapes[:3]))


def _line(devices: int) -> tuple[Shape, ...]:
    return ((devices,),)


def _grids(devices: int) -> tuple[Shape, ...]:
    return tuple(shape for shape in mesh_shapes(devices, 2) if len(shape) == 2)


def _rows(devices: int) -> tuple[Shape, ...]:
    return tuple((devices // n, n) for n in range(2, devices + 1) if devices % n == 0)


def _square(devices: int) -> tuple[Shape, ...]:
    side = math.isqrt(devices)
    return ((side, side),) if side > 1 and side * side == devices else ()


def _deep_square(devices: int) -> tuple[Shape, ...]:
    sides = range(2, math.isqrt(devices) + 1)
    return tuple((devices // (q * q), q, q) for q in sides if devices % (q * q) == 0)


def _cube(devices: int) -> tuple[Shape, ...]:
    side = round(devices ** (1 / 3))
    return ((side, side, side),) if side > 1 and side**3 == devices else ()


def _finest(devices: int) -> tuple[Shape, ...]:
    """The meshes of three axes, or of two where those would be many.

    One that joins neighbouring axes of another can do nothing that the other can't, so it is left out.
    """
    for most in (3, 2):
        shapes = mesh_shapes(devices, most)
        finest = tuple(shape for shape in shapes if len(shape) == max(map(len, shapes)))
        if len(finest) <= MOST_WITH_THREE:
            return finest
    return finest


_TABLE = (
    Mode("auto", (_FREE,), _finest, "any mesh"),
    Mode("ddp", (_data("R"),), _line, "one axis"),
    Mode("zero1", (_data("K"),), _line, "one axis"),
    Mode("zero2", (_data("K"),), _line, "one axis"),
    Mode("zero3", (_data("Z"),), _line, "one axis"),
    Mode("1d", (_TENSOR,), _line, "one axis"),
    Mode("sequence", (AxisMode(frozenset({"data", "model"}), frozenset("RS")),), _line, "one axis"),
    Mode("zero+1d", (_data("Z"), _TENSOR), _grids, "two axes, so a number of devices that is no prime"),
    Mode("2d", (_matmul("rows"), _matmul("columns")), _square, "q x q devices (4, 9, 16, ...)"),
    Mode("2.5d", (_data("R"), _matmul("rows"), _matmul("columns")), _deep_square,
         "depth x q x q devices (4, 8, 12, ...)"),
    Mode("3d", (_matmul("rows"), _matmul("columns"), _matmul("inner")), _cube, "q x q x q devices (8, 27, 64, ...)"),
)
_BY_NAME = {mode.name: mode for mode in _TABLE}
_STAGED = (
    Mode("pp", (_data("R"),), _line, "one axis", True),
    Mode("pp+zero", (_data("K"),), _line, "one axis", True),
    Mode("pp1d", (_data("R"), _TENSOR), _rows, "two axes, data and tensor", True),
    *(replace(_BY_NAME[name], name=f"pp{name}", staged=True) for name in ("2d", "2.5d", "3d")),
    replace(_BY_NAME["sequence"], name="pp+sequence", staged=True),
)
MODES: dict[str, Mode] = {mode.name: mode for mode in (*_TABLE, *_STAGED)}


def mode_called(name: str) -> Mode:
    """The mode called `name`. Raises UnknownName for others."""
    if name not in MODES:
        raise UnknownName("mode", name, list(MODES))
    return MODES[name]
