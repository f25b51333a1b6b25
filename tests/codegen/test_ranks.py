"""What ranks do together: all go on, or all are told why not."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.codegen.ranks import on_rank_zero, together
from autopar.core.errors import AutoparError, Infeasible, UnknownName

FAILURES: dict[str, Exception] = {
    "infeasible": Infeasible("needs 5 GiB", 5.0), "without a budget": Infeasible("no way"),
    "unknown": UnknownName("mode", "fast", ["auto"]), "fault": KeyError("inner"),
}


def raised(act: Any) -> tuple[str, str, float | None]:
    """Type, text and least budget of what `act` raises, or what it returns."""
    try:
        return "nothing", act(), None
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "least_budget_bytes", None)


def failing(failure: str) -> Any:
    def act() -> str:
        raise FAILURES[failure]
    return act


def zero(rank: int, world_size: int, failure: str) -> list[tuple[str, str, float | None]]:
    """What each rank sees of rank 0's work, and that they are in step afterwards."""
    make = failing(failure) if failure else (lambda: "made")
    return [raised(lambda: on_rank_zero(make)), raised(lambda: on_rank_zero(lambda: "again"))]


@pytest.mark.dist
@pytest.mark.parametrize(("failure", "wanted"), [
    ("", [("nothing", "made", None)] * 2), ("infeasible", [("Infeasible", "needs 5 GiB", 5.0)] * 2),
    ("without a budget", [("Infeasible", "no way", None)] * 2),
    ("unknown", [("UnknownName", "unknown mode 'fast'; known: auto", None),
                 ("AutoparError", "unknown mode 'fast'; known: auto", None)]),
    ("fault", [("KeyError", "'inner'", None),
               ("AutoparError", "rank 0 failed with KeyError: 'inner'; see its traceback", None)]),
])
def test_rank_zero_s_failure_is_everybody_s(pool: Any, failure: str, wanted: Any) -> None:
    assert pool(2).run(zero, failure) == [[first, ("nothing", "again", None)] for first in wanted]


def all_of(rank: int, world_size: int, failures: tuple[str, ...]) -> list[tuple[str, str, float | None]]:
    act = failing(failures[rank]) if failures[rank] else (lambda: f"by {rank}")
    return [raised(lambda: together(act)), raised(lambda: together(lambda: "again"))]


@pytest.mark.dist
@pytest.mark.parametrize(("failures", "wanted"), [
    (("", ""), [("nothing", "by 0", None), ("nothing", "by 1", None)]),
    (("", "unknown"), [("AutoparError", "unknown mode 'fast'; known: auto", None),
                       ("UnknownName", "unknown mode 'fast'; known: auto", None)]),
    (("infeasible", ""), [("Infeasible", "needs 5 GiB", 5.0), ("AutoparError", "needs 5 GiB", None)]),
    (("infeasible", "infeasible"), [("Infeasible", "needs 5 GiB", 5.0)] * 2),
    (("fault", ""), [("KeyError", "'inner'", None), ("AutoparError", "KeyError: 'inner'", None)]),
])
def test_one_rank_s_failure_is_told_to_all(pool: Any, failures: tuple[str, ...], wanted: Any) -> None:
    assert pool(2).run(all_of, failures) == [[first, ("nothing", "again", None)] for first in wanted]


@pytest.mark.dist
def test_several_ranks_failures_are_told_in_one(pool: Any) -> None:
    found = pool(4).run(all_of, ("", "unknown", "fault", "unknown"))
    text = "KeyError: 'inner'; unknown mode 'fast'; known: auto"
    assert [first for first, _ in found] == [("AutoparError", text, None), ("AutoparError", text, None),
                                             ("KeyError", "'inner'", None), ("AutoparError", text, None)]


def test_alone_it_is_a_plain_call() -> None:
    assert together(lambda: 3) == 3
    with pytest.raises(Infeasible, match="needs 5 GiB"):
        together(failing("infeasible"))
    assert issubclass(Infeasible, AutoparError)
