"""Python values that a forward changes, such as `self.n += 1`: a program has them as they were when it was traced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from autopar.core.errors import CaptureError
from autopar.core.told import some
from autopar.passes.blame import here

CHANGES = "the forward changes "
"""How notes of such values begin."""
ABSENT = "absent"
_VALUES = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Change:
    """One value, by its name in the model, before and after a forward; `where` is ` at file:line in function`."""

    name: str
    before: Any
    after: Any
    where: str

    def __str__(self) -> str:
        return f"{self.name} ({self.before} to {self.after}){self.where}"


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Change]]:
    """What the first forward of `model` inside changes, known once that has run."""
    before, found, lines = _values(model), list[Change](), dict[tuple[int, str], str]()

    def look(*_: Any) -> None:
        if not found:
            paths = {id(module): path for path, module in model.named_modules()}
            found.extend(Change(f"{paths[at[0]]}.{at[1]}".removeprefix("."), before.get(at, ABSENT), value,
                                lines.get(at, ""))
                         for at, value in _values(model).items() if before.get(at, ABSENT) != value)

    handle, own = model.register_forward_hook(look), nn.Module.__setattr__

    def noting(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, _VALUES):
            lines[id(module), name] = here()
        own(module, name, value)

    nn.Module.__setattr__ = noting  # type: ignore[method-assign,assignment]
    try:
        yield found
    finally:
        nn.Module.__setattr__ = own  # type: ignore[method-assign]
        handle.remove()


def notes_of(changes: Sequence[Change]) -> tuple[str, ...]:
    """What is said of changes that a second call computes the same with; values that are set once need no word."""
    told = [str(change) for change in changes if change.before != ABSENT]
    return (f"{CHANGES}{some(told)}, no tensor but a Python value: it stays as in its first call; hold such values in "
            "buffers",) if told else ()


def check_same(changes: Sequence[Change], first: ExportedProgram, second: ExportedProgram, model: nn.Module) -> None:
    """Raises CaptureError where a forward computes something else once it has changed its values."""
    if _told(first) == _told(second) and _alike(first.constants, second.constants):
        return
    raise CaptureError(f"{type(model).__name__} can't be planned: its forward changes "
                       f"{some([str(change) for change in changes])}, no tensor but a Python value, and its next call "
                       "computes something else with that; hold such values in buffers, which are written in place")


def _values(model: nn.Module) -> dict[tuple[int, str], Any]:
    """What modules hold besides tensors and structure, as far as it is a number or a text, by module and name."""
    return {(id(module), name): value for module in model.modules() for name, value in vars(module).items()
            if name != "training" and isinstance(value, _VALUES)}


def _told(exported: ExportedProgram) -> list[str]:
    return [f"{node.name} = {node.target}{node.args}{node.kwargs}" for node in exported.graph.nodes]


def _alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(x, y) for x, y in ((value, second[name]) for name, value in first.items())
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and not x.is_meta)
