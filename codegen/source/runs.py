"""Tables of what blocks hold, written once for blocks that are alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Row = TypeVar("Row")
_BLOCK = re.compile(r"(?P<before>(?:[^.]*[^.\d][^.]*\.)*)(?P<number>\d+)\.(?P<rest>.+)")
"""A name in a block: its path up to the first number, what is behind."""


@dataclass(frozen=True, slots=True)
class Run(Generic[Row]):
    """Equal `rows` of blocks `path` with `numbers` in place of its braces; one number, and whole names, where there is
    nothing to repeat."""

    path: str
    numbers: range
    rows: dict[str, Row]


def runs_of(table: Mapping[str, Row]) -> list[Run[Row]]:
    """The rows of `table` by blocks, blocks that follow on each other and are alike together."""
    blocks: dict[tuple[str, int], dict[str, Row]] = {}
    for name, row in table.items():
        found = _BLOCK.fullmatch(name)
        key, rest = ((found["before"], int(found["number"])), found["rest"]) if found else (("", -1), name)
        blocks.setdefault(key, {})[rest] = row
    runs: list[Run[Row]] = []
    for (before, number), rows in blocks.items():
        path, last = f"{before}{{}}", runs[-1] if runs else None
        if last is not None and last.path == path and last.numbers.stop == number and last.rows == rows:
            runs[-1] = Run(path, range(last.numbers.start, number + 1), rows)
        else:
            runs.append(Run(path, range(number, number + 1), rows))
    return [run if len(run.numbers) > 1 else _alone(run) for run in runs]


def _alone(run: Run[Row]) -> Run[Row]:
    number = run.numbers.start
    before = "" if number < 0 else run.path.format(number) + "."
    return Run(run.path, range(1), {f"{before}{name}": row for name, row in run.rows.items()})


def repeated(path: str, numbers: Iterable[int], rows: Mapping[str, Row]) -> dict[str, Row]:
    """`rows` for each of the blocks: their names behind `path`, which has a number in place of its braces."""
    return {f"{path.format(number)}.{name}": row for number in numbers for name, row in rows.items()}
