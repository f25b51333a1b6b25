"""What each rank brings to a call, and what all together make of it.

A batch comes whole on every rank, or in parts: along some axes of the mesh ranks bring different samples, along the
others the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from autopar.codegen.control import exchanged
from autopar.codegen.ranks import together
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh

Axes = tuple[int, ...]
Shape = tuple[int, ...]
UNKNOWN = -1
ELSEWHERE = 2
"""What `fits` is for a rank that does something else with all ranks where others call the model."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One rank's call: whether it fits what was traced and trains, its samples, the rest of its shapes, its data.

    `rest` and `data` are digests, `data` UNKNOWN where it was not read.
    """

    fits: int
    training: int
    rows: int
    rest: int
    data: int = UNKNOWN

    def told(self) -> list[Offer]:
        """Every rank's offer, by rank; collective."""
        return [Offer(*each) for each in exchanged((self.fits, self.training, self.rows, self.rest, self.data))]


def gathered(make: Callable[[], Offer]) -> list[Offer]:
    """Every rank's offer, by rank; collective, even where a rank fails to make its own.

    What it raises there is raised here, and an AutoparError of the same text on the others, which must not wait for it.
    """
    failure: Exception | None = None
    try:
        mine = make()
    except Exception as error:
        mine, failure = Offer(0, 0, UNKNOWN, 0), error
    offers = mine.told()
    if {offer.fits for offer in offers} in ({0}, {0, 1}):
        together(partial(_raise, failure))
    check_modes(offers)
    return offers


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


@dataclass(frozen=True, slots=True)
class Batched:
    """Which of a program's inputs have the samples in their first dim, and how many; `shapes` None: no tensor."""

    shapes: tuple[Shape | None, ...]
    rows: int

    def rest(self, leaves: list[Any]) -> tuple[Any, ...]:
        """The shapes of a call but for the number of samples."""
        return tuple(_rest(leaf, planned, self.rows) for leaf, planned in zip(leaves, self.shapes, strict=True))

    def rows_of(self, leaves: list[Any]) -> int:
        """The number of samples of a call, UNKNOWN where its inputs don't agree."""
        found = {leaf.shape[0] for leaf, planned in zip(leaves, self.shapes, strict=True)
                 if isinstance(leaf, Tensor) and leaf.ndim and self.has(planned)}
        return found.pop() if len(found) == 1 else UNKNOWN

    def has(self, planned: Shape | None) -> bool:
        """Whether an input of that shape has the samples."""
        return bool(planned) and planned[0] == self.rows  # type: ignore[index]


def batched(placeholders: list[fx.Node]) -> Batched:
    """The samples of a program: the first dim of its first input, and of all that are as long."""
    values = [p.meta.get("val") for p in placeholders]
    shapes = tuple(tuple(v.shape) if isinstance(v, Tensor) else None for v in values)
    return Batched(shapes, next((s[0] for s in shapes if s), 1))


def _rest(leaf: Any, planned: Shape | None, rows: int) -> Any:
    if not isinstance(leaf, Tensor):
        return None
    has = bool(planned) and planned[0] == rows and leaf.ndim  # type: ignore[index]
    return (has, *leaf.shape[1:]) if has else tuple(leaf.shape)


@dataclass(slots=True)
class Habits:
    """What was made of earlier calls: along which axes samples differed in the last, and by ranks' samples."""

    last: Axes | None = None
    by_rows: dict[tuple[int, ...], Axes] = field(default_factory=dict)


def meet(what: str) -> None:
    """Raises AutoparError on all ranks where some come to do `what` and others do not; collective."""
    check_modes(Offer(ELSEWHERE, 0, UNKNOWN, digest([what])).told())


def check_modes(offers: list[Offer]) -> None:
    """Raises AutoparError where some ranks train and others evaluate, or do something else altogether."""
    away = {offer.rest if offer.fits == ELSEWHERE else UNKNOWN for offer in offers}
    if len(away) > 1:
        raise AutoparError("some ranks call the model while others save, load, copy or gather its state; "
                           "save_checkpoint, load_checkpoint, full_state_dict and copy.deepcopy are for all ranks "
                           "together: call them on each")
    training = [rank for rank, offer in enumerate(offers) if offer.training]
    if training and len(training) < len(offers):
        named = f"{', '.join(map(str, training[:4]))}{', ...' if len(training) > 4 else ''}"
        raise AutoparError(f"{len(training)} of {len(offers)} ranks train ({named}) and the others evaluate; call "
                           "model.train(), model.eval() and torch.no_grad() alike on all ranks")


def axes_of_offers(offers: list[Offer], rows: int, ways: tuple[Axes, ...], habits: Habits, mesh: Mesh) -> Axes:
    """Along which of the `ways` ranks bring different samples, for a program of `rows` samples; all have one answer.

    Shapes and whether the data are the same tell, and where those fit several ways what was so before, which is kept
    in `habits`. Raises AutoparError on all ranks alike when their batches don't go together.
    """
    if len({(offer.fits, offer.training, offer.rest) for offer in offers}) > 1 or offers[0].rows == UNKNOWN:
        raise AutoparError("ranks brought batches of different kinds")
    brought = tuple(offer.rows for offer in offers)
    fitting = [axes for axes in ways if all(each * mesh.extent(axes) == rows for each in brought)]
    read = all(offer.data != UNKNOWN for offer in offers)
    before = _all_of(habits.last)
    unread = [*fitting, *before] if () in ways else [*before, *fitting]  # parts by word stay parts, of any size
    likely = _likely(offers, fitting, ways, habits.last, mesh) if read else [*unread, ways[-1]]
    chosen = likely[0] if read else habits.by_rows.get(brought, likely[0])
    _check_same(offers, chosen, mesh)
    habits.last = habits.by_rows[brought] = chosen
    return chosen


def _likely(offers: list[Offer], fitting: list[Axes], ways: tuple[Axes, ...], last: Axes | None,
            mesh: Mesh) -> list[Axes]:
    """The ways from the likeliest on, for data that are known: equal ones on ranks that differ are no chance.

    Where all ways are parts, whole batches are none, and those whose data differ are parts of a larger one.
    """
    alike = [axes for axes in ways if _alike(offers, axes, mesh)]
    if () not in ways and alike:
        fitting = [axes for axes in fitting if axes in alike]
        last = last if last in alike else None
    same = [axes for axes in alike if mesh.extent(axes) < mesh.size]
    before = _all_of(last)
    return [*(axes for axes in before if axes in fitting or axes in same), *(axes for axes in fitting if axes in alike),
            *fitting, *before, *alike, ways[-1]]


def _all_of(axes: Axes | None) -> list[Axes]:
    return [] if axes is None else [axes]


def _groups(offers: list[Offer], axes: Axes, mesh: Mesh) -> list[list[Offer]]:
    """The offers of ranks that bring the same samples."""
    found: dict[tuple[int, ...], list[Offer]] = {}
    for rank, offer in enumerate(offers):
        place = mesh.coordinate(rank)
        found.setdefault(tuple(place[axis] for axis in axes), []).append(offer)
    return list(found.values())


def _alike(offers: list[Offer], axes: Axes, mesh: Mesh) -> bool:
    """Whether the data of ranks that would bring the same are the same."""
    return all(len(set(group)) == 1 for group in _groups(offers, axes, mesh))


def _check_same(offers: list[Offer], axes: Axes, mesh: Mesh) -> None:
    for group in _groups(offers, axes, mesh):
        if len({offer.rows for offer in group}) > 1:
            raise AutoparError("ranks brought batches of different kinds")
        known = UNKNOWN not in {offer.data for offer in group}
        if known and len({offer.data for offer in group}) > 1:
            which = "every rank passed a batch of the global shapes" if not axes else (
                "ranks that need the same samples passed batches")
            raise AutoparError(f"{which}, but their data differ")


def digest(leaves: list[Any]) -> int:
    """A number that tells different data apart."""
    found = hashlib.sha256()
    for leaf in leaves:
        found.update(_raw(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
    return int.from_bytes(found.digest()[:7], "big")


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def grown_to(tensor: Tensor, rows: int, more: int) -> Tensor:
    """`tensor` on meta, with `more` samples where it has `rows`."""
    shape = (more, *tensor.shape[1:]) if tensor.ndim and tensor.shape[0] == rows else tensor.shape
    return torch.empty(shape, dtype=tensor.dtype, device="meta")
