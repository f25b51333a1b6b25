"""From a call's arguments to a program's inputs: which program, whose part of the batch, how many rows to add."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopar.codegen.calls import Form, arranged, check_leaf
from autopar.codegen.executable import Executable
from autopar.codegen.offers import (
    UNKNOWN,
    Axes,
    Batched,
    Habits,
    Offer,
    Shape,
    axes_of_offers,
    batched,
    digest,
    gathered,
)
from autopar.codegen.ranks import by_rank
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh
from autopar.passes.additive import Additive
from autopar.passes.capture import Program

BatchKind = Literal["global", "local"]
Shapes = tuple[Shape | None, ...]
log = logging.getLogger("autopar")


@dataclass(frozen=True, eq=False)
class Bound:
    """One call: the executable and its inputs on the device."""

    executable: Executable
    inputs: dict[fx.Node, Tensor]


@dataclass(frozen=True, eq=False)
class Plans:
    """Where executables come from: `make(training, call, axes)` plans and lowers one; collective.

    `program` is what was compiled, `ways` the axes along which ranks may bring different samples, `cut` those of them
    along which the plan wants them so; `adds` tells which inputs mark samples that count for nothing; `like` is the
    plain model without values. A batch of
    another size is filled up to a multiple of the ranks and of `grain`.
    """

    make: Callable[[bool, Any, Axes], Executable]
    program: Program
    mesh: Mesh
    ways: tuple[Axes, ...]
    cut: Axes
    adds: Additive
    form: Form
    like: nn.Module
    grain: int = 1


@dataclass(eq=False)
class Batches:
    """Finds the executable for a call and brings the call into its shapes."""

    plans: Plans
    known: dict[tuple[bool, Shapes, Axes], Executable] = field(default_factory=dict)
    seen: set[Shapes] = field(default_factory=set)
    sizes: dict[Any, set[int]] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    habits: Habits = field(default_factory=Habits)

    def __post_init__(self) -> None:
        planned = batched(self.plans.program.placeholders("input"))
        self.sizes[planned.rest([_like(s) for s in planned.shapes])] = {planned.rows}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, device: torch.device) -> Bound:
        """The program for a call and its inputs. Raises AutoparError, on every rank, when the call fits none."""
        program, plans = self.plans.program, self.plans
        placeholders = program.placeholders("input")
        planned = batched(placeholders)
        leaves: list[Any] = []

        def offer() -> Offer:
            leaves[:] = arranged(args, kwargs, program.in_spec, plans.form)
            check_leaves(leaves, placeholders, device)
            check_rows(planned.rows_of(leaves), leaves)
            return Offer(1, training, planned.rows_of(leaves), digest([planned.rest(leaves)]), self._data(leaves))

        axes, offers = self._agreed(gathered(offer), planned, leaves)
        rows = self._rows(planned, leaves, offers, axes)
        shapes = tuple((rows, *shape[1:]) if planned.has(s) and shape else shape
                       for s, shape in zip(planned.shapes, _shapes(leaves), strict=True))
        executable = self._executable(training, leaves, shapes, axes)
        part = rows // plans.mesh.extent(axes)
        marks = {placeholders.index(n): mark for n, mark in plans.adds.marks.items()}
        nodes = executable.decision.context.segmented.factored.program.placeholders("input")
        full = [_filled(leaf, part, marks.get(i)) if planned.has(planned.shapes[i]) else leaf
                for i, leaf in enumerate(leaves)]
        return Bound(executable, {n: _cast(n, leaf.to(device)) for n, leaf in zip(nodes, full, strict=True)
                                  if isinstance(leaf, Tensor)})

    def _data(self, leaves: list[Any]) -> int:
        """A digest of the data where it is needed and in host memory, or its shapes are new: reading a GPU's memory
        would make it wait."""
        new = _shapes(leaves) not in self.seen
        self.seen.add(_shapes(leaves))
        on_host = all(leaf.device.type == "cpu" for leaf in leaves if isinstance(leaf, Tensor))
        size = self.plans.mesh.size
        shared = any(self.plans.mesh.extent(axes) < size for axes in self.habits.by_rows.values())
        return digest(leaves) if size > 1 and (new or (shared and on_host)) else UNKNOWN

    def _agreed(self, offers: list[Offer], planned: Batched, leaves: list[Any]) -> tuple[Axes, list[Offer]]:
        """Along which axes ranks bring different samples, and what all bring."""
        plans = self.plans
        try:
            axes = axes_of_offers(offers, planned.rows, plans.ways, self.habits, plans.mesh)
        except AutoparError as error:
            raise AutoparError(f"{error}: inputs of shapes {by_rank(str(list(_shapes(leaves))))}; pass the same whole "
                               "batch on every rank, or on each its own part") from None
        return axes, offers

    def _rows(self, planned: Batched, leaves: list[Any], offers: list[Offer], axes: Axes) -> int:
        """The samples of the program to run: one that is known, with samples added where some may be, else a new one.
        """
        devices, obstacle = math.lcm(self.plans.mesh.size, self.plans.grain), self.plans.adds.obstacle
        parts, brought = self.plans.mesh.extent(axes), [offer.rows for offer in offers]
        most, known = max(brought) * parts, self.sizes.setdefault(planned.rest(leaves), set())
        if obstacle and len(set(brought)) > 1:
            raise AutoparError(f"ranks brought {brought} samples, and none can be added that count for nothing: "
                               f"{obstacle}; bring as many on each, such as by drop_last=True")
        rows = most if obstacle or most in known else min((r for r in known if r >= most and r % parts == 0),
                                                          default=-(-most // devices) * devices)
        if rows not in known:
            self._tell(f"inputs of shapes {list(_shapes(leaves))} on a rank come for the first time: planning for a "
                       f"batch of {rows} such samples, parameters as they lie")
        if sum(brought) * parts != rows * self.plans.mesh.size:
            self._tell(f"a batch of {sum(brought) * parts // self.plans.mesh.size} samples runs as one of {rows}, "
                       "filled up with samples that count for nothing")
        known.add(rows)
        return rows

    def _tell(self, text: str) -> None:
        if text not in self.said:
            log.warning(text)
        self.said.add(text)

    def _executable(self, training: bool, leaves: list[Any], shapes: Shapes, axes: Axes) -> Executable:
        key = training, shapes, axes
        if key not in self.known:
            spec = self.plans.program.in_spec
            whole = [leaf if shape is None else torch.empty(shape, dtype=leaf.dtype, device="meta")
                     for leaf, shape in zip(leaves, shapes, strict=True)]
            try:
                self.known[key] = self.plans.make(training, pytree.tree_unflatten(whole, spec), axes)
            except AutoparError as error:
                planned = list(batched(self.plans.program.placeholders("input")).shapes)
                raise AutoparError(f"inputs of shapes {list(_shapes(leaves))} can't be planned for beside {planned}, "
                                   f"for which the model was compiled: {error}") from error
        return self.known[key]


def _shapes(leaves: list[Any]) -> Shapes:
    return tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves)


def _like(shape: Shape | None) -> Tensor | None:
    return None if shape is None else torch.empty(shape, device="meta")


def _filled(leaf: Any, rows: int, mark: int | None) -> Any:
    """A tensor of `rows` samples: those of `leaf`, then copies of them, or where there is a mark that."""
    if not isinstance(leaf, Tensor) or leaf.shape[0] == rows:
        return leaf
    more = rows - leaf.shape[0]
    if mark is not None:
        return torch.cat([leaf, leaf.new_full((more, *leaf.shape[1:]), mark)])
    return leaf[torch.arange(rows, device=leaf.device) % leaf.shape[0]]


def check_rows(rows: int, leaves: list[Any]) -> None:
    """Raises AutoparError unless all inputs have one number of samples, at least one."""
    if rows < 1:
        found = "inputs of different numbers of samples" if rows == UNKNOWN else "a batch of 0 samples"
        raise AutoparError(f"the call has {found}, of shapes {list(_shapes(leaves))}; give as many samples in each")


def check_leaves(leaves: list[Any], placeholders: list[fx.Node], device: torch.device) -> None:
    """Raises AutoparError unless there is a leaf of its kind for each placeholder, where this rank can read it."""
    if len(leaves) != len(placeholders):
        raise AutoparError(f"the call has {len(leaves)} inputs, the plan was made for {len(placeholders)}: "
                           f"{[p.name for p in placeholders]}; pass the same as when it was made")
    lacking = [node.name for node, leaf in zip(placeholders, leaves, strict=True)
               if leaf is None and isinstance(node.meta.get("val"), Tensor)]
    if lacking:
        raise AutoparError(f"the call has no {' and no '.join(lacking)}, the plan was made for "
                           f"{', '.join(p.name for p in placeholders)}; pass the same as when it was made")
    for node, leaf in zip(placeholders, leaves, strict=True):
        check_leaf(node, leaf)
        check_device(node.name, leaf, device)


def check_device(name: str, leaf: Any, device: torch.device) -> None:
    """Raises AutoparError for a tensor that this rank, which runs on `device`, can't read."""
    if isinstance(leaf, Tensor) and leaf.device not in (device, torch.device("cpu")):
        raise AutoparError(f"input {name} is on {leaf.device}, this rank runs on {device}; pass tensors on "
                           f"{device}, or on the CPU, from where they are copied")


def _cast(node: fx.Node, leaf: Tensor) -> Tensor:
    wanted: torch.dtype = node.meta["val"].dtype
    return leaf.to(wanted)
