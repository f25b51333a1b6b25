"""Why no mesh shape has a plan, in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autopar.core.errors import AutoparError, Infeasible
from autopar.core.mesh import Mesh

MOST_NAMED = 3
"""Mesh shapes that are named beside the one whose reason is told."""
_UNITS = (("GiB", 2.0**30), ("MiB", 2.0**20))
_REMEDY = "raise the budget, use more devices or a smaller batch"


Refusals = Sequence[tuple[Mesh, AutoparError]]
Remedy = Callable[[Infeasible], str]


def merged(refusals: Refusals, pins: Sequence[tuple[str, str]], budget: float,
           remedy: Remedy = lambda refusal: _REMEDY) -> AutoparError:
    """One error for the refusals of all mesh shapes: Infeasible if any is, with the least budget that would do.

    `budget` is in bytes a device, `remedy` says what would help against a refusal. Pins are told, as without them there
    may be a plan.
    """
    pinned = f"with {', '.join(f'{name} pinned to {strategy}' for name, strategy in pins)}: " if pins else ""
    least = [(refusal.least_budget_bytes, mesh, refusal) for mesh, refusal in refusals
             if isinstance(refusal, Infeasible) and refusal.least_budget_bytes is not None]
    if least:
        needed, mesh, smallest = min(least, key=lambda found: found[0])
        others = f", the least of {len(refusals)} mesh shapes" if len(refusals) > 1 else ""
        return Infeasible(f"{pinned}needs {_size(needed)} a device on mesh {mesh}{others}, the budget is "
                          f"{_size(budget)}; {remedy(smallest)}", needed, smallest.parts)
    (mesh, refusal), *rest = sorted(refusals, key=lambda found: not isinstance(found[1], Infeasible))
    more = f" and {len(rest) - MOST_NAMED} more" if len(rest) > MOST_NAMED else ""
    others = f"; no plan on {', '.join(str(other) for other, _ in rest[:MOST_NAMED])}{more} either" if rest else ""
    text = f"mesh {mesh}: {refusal}{others}"
    return Infeasible(f"{pinned}{text}") if isinstance(refusal, Infeasible) else AutoparError(text)


def _size(nbytes: float) -> str:
    """An amount of memory in a unit that shows it, and in bytes."""
    unit = next((f"{nbytes / size:.3f} {name} " for name, size in _UNITS if nbytes >= size), "")
    return f"{unit}({nbytes:.0f} bytes)" if unit else f"{nbytes:.0f} bytes"
