"""How messages name a value that was not what it had to be."""

from __future__ import annotations

MOST = 60
"""Characters of a value that are shown."""


def told(value: object) -> str:
    """`value` on one line, cut short where it is long, with its type."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = "a value that can't be printed"
    return f"{text if len(text) <= MOST else text[:MOST - 3] + '...'}, of type {type(value).__name__}"


def some(names: list[str]) -> str:
    """The first of `names` and how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
