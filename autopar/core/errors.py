"""What users are told when something cannot be done."""

from __future__ import annotations

from dataclasses import dataclass


class AutoparError(Exception):
    """A failure the user can act on: names the thing, the value found, the value needed and the remedy."""


class UnknownName(AutoparError):
    """A name that is not in a table, told together with the names that are."""

    def __init__(self, kind: str, name: str, known: list[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(sorted(known))}")


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes of a device: those at rest with gradients, those that go with its samples, and what is around them."""

    rest: float
    step: float
    around: float = 0.0


class Infeasible(AutoparError):
    """No plan satisfies the constraints; the message says which and what would do.

    `least_budget_bytes` is the least budget of a device that has a plan, None where no budget would do; `parts` are
    what it is made of, where that is known.
    """

    def __init__(self, message: str, least_budget_bytes: float | None = None, parts: Parts | None = None) -> None:
        super().__init__(message)
        self.least_budget_bytes, self.parts = least_budget_bytes, parts


class CaptureError(AutoparError):
    """The model could not be exported; the message names the user's line."""


class RankLost(AutoparError):
    """A rank stopped answering, or can't go on; each rank that is left finds out by itself."""
