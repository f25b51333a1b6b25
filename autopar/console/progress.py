"""What is being done, told on standard error while it is done."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.status import Status
from rich.text import Text

from autopar import hush


class Progress(Protocol):
    """Told what begins now, and what has been found."""

    def doing(self, text: str) -> None: ...
    def found(self, text: str) -> None: ...


class Silent:
    """Says nothing."""

    def doing(self, text: str) -> None:
        """Nothing."""

    def found(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Lines:
    """One plain line each, with the seconds since the start."""

    start: float = field(default_factory=time.perf_counter)

    def doing(self, text: str) -> None:
        """A line."""
        print(f"{time.perf_counter() - self.start:6.1f} s  {text}", file=sys.stderr, flush=True)

    def found(self, text: str) -> None:
        """A line."""
        self.doing(text)


@dataclass(frozen=True, slots=True)
class Spinner:
    """One line that changes, what has been found above it."""

    console: Console
    status: Status

    def doing(self, text: str) -> None:
        """Change the line."""
        self.status.update(Text(text))

    def found(self, text: str) -> None:
        """Leave a line."""
        self.console.print(Text(text))


@contextlib.contextmanager
def telling(verbose: bool) -> Iterator[Progress]:
    """Lines when `verbose`, else a spinner on a terminal, else silence."""
    console = Console(file=sys.stderr)
    if verbose or not console.is_terminal:
        yield Lines() if verbose else Silent()
        return
    with console.status("") as status:
        yield Spinner(console, status)


@contextlib.contextmanager
def hushed(verbose: bool) -> Iterator[None]:
    """Unless `verbose`, what libraries print and log inside is lost: what they fail at comes as an exception."""
    if verbose:
        yield
        return
    with hush.hushed(), contextlib.redirect_stdout(io.StringIO()):
        yield
