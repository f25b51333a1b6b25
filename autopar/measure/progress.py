"""How far measuring is, as one line on the terminal of rank 0 that goes when it is done."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Advance = Callable[[str], None]


@contextlib.contextmanager
def advancing(rank: int, steps: int) -> Iterator[Advance]:
    """A function that is told what each of so many steps was; it says nothing where there is no terminal."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("measuring {task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"),
               TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=rank > 0 or not console.is_terminal) as bar:
        task = bar.add_task("devices", total=steps)
        yield lambda what: bar.update(task, advance=1, description=what)


def tell(rank: int, text: str) -> None:
    """A line on standard error, once."""
    if rank == 0:
        print(text, file=sys.stderr, flush=True)
