"""What all ranks of a job do together, so that when one can't go on none waits for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from autopar.codegen.control import all_there, control, exchanged
from autopar.core.errors import AutoparError, Infeasible

Value = TypeVar("Value")


def on_rank_zero(make: Callable[[], str]) -> str:
    """What rank 0's `make` returns, on every rank; its AutoparError is raised on every rank, Infeasible as such."""
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            said = [("made", make(), None)]
        except AutoparError as error:
            told = ("infeasible", str(error), error.least_budget_bytes) if isinstance(error, Infeasible) else (
                "refused", str(error), None)
            _broadcast([told])
            raise
        except BaseException as error:
            text = f"rank 0 failed with {type(error).__name__}: {error}; see its traceback"
            _broadcast([("refused", text, None)])
            raise
    _broadcast(said)
    kind, text, least = said[0]
    if kind == "infeasible":
        raise Infeasible(text, least)
    if kind == "refused":
        raise AutoparError(text)
    return str(text)


def together(act: Callable[[], Value]) -> Value:
    """What `act` returns on this rank. What it raises on any rank is an AutoparError of one text on all others.

    Collective where there are ranks, even when `act` fails.
    """
    try:
        found = act()
    except Exception as error:
        mine = str(error) if isinstance(error, AutoparError) else f"{type(error).__name__}: {error}"
        failures = _exchanged(mine)
        if failures == [mine] or not isinstance(error, AutoparError):
            raise
        raise AutoparError("; ".join(failures)) from error
    failures = _exchanged(None)
    if failures:
        raise AutoparError("; ".join(failures))
    return found


def check_alike(told: Mapping[str, str]) -> None:
    """Raises AutoparError on every rank, with both values, where one tells another thing than rank 0. Collective."""
    said: list[Any] = [dict(told)]
    _broadcast(said)

    def compare() -> None:
        for word in said[0] | told:
            first, here = said[0].get(word, "absent"), told.get(word, "absent")
            if first != here:
                raise AutoparError(f"{word} is {first} on rank 0 and {here} on another; give all ranks the same")
    together(compare)


def told_by_all(mine: Any) -> list[Any]:
    """What each rank tells, by rank, pickled on the way; collective."""
    said: list[Any] = [mine]
    if dist.get_world_size() > 1:
        said = [None] * dist.get_world_size()
        with all_there():
            dist.all_gather_object(said, mine, group=control())
    return said


def by_rank(mine: str) -> str:
    """What each rank tells, as `a on rank 0, b on ranks 1, 2`; collective."""
    said = told_by_all(mine)
    ranks = {text: [str(rank) for rank, each in enumerate(said) if each == text] for text in said}
    return ", ".join(f"{text} on rank{'s' if len(which) > 1 else ''} {', '.join(which)}"
                     for text, which in ranks.items())


def _broadcast(said: list[Any]) -> None:
    """Rank 0's entries in place of all others'."""
    with all_there():
        dist.broadcast_object_list(said)


def _exchanged(failure: str | None) -> list[str]:
    """The failures of all ranks, each once, in one order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [] if failure is None else [failure]
    if not any(failed for (failed,) in exchanged((int(failure is not None),))):
        return []
    return sorted({text for text in told_by_all(failure) if text is not None})
