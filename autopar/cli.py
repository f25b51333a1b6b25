"""`autopar-solve`: exit status 0 with a plan, 2 when what was asked for can't be done, 1 for faults of ours."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

from autopar.console.options import Options, parse_options
from autopar.console.progress import telling
from autopar.core.errors import AutoparError, Infeasible

INTERRUPTED = 130
CLOSED = 141
NO_MEMORY = ("planning takes more memory than this machine has left; use a smaller --batch or --seq, or a machine with "
             "more")


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan as `arguments` say, print the plan, and return the exit status. SystemExit after `--help`."""
    start = time.perf_counter()
    if arguments is not None:
        return _status(list(arguments), start)
    ended: list[int] = []
    atexit.register(_leave, ended)  # first to register, last to run
    ended.append(_status(sys.argv[1:], start))
    return ended[0]


def _status(given: list[str], start: float) -> int:
    try:
        print(_answer(parse_options(given), start), flush=True)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush at exit goes nowhere
        return CLOSED
    except Exception as error:
        return _failed(error, given)
    return 0


def _leave(ended: list[int]) -> None:
    """End the process, where its status is known, without taking apart what is left: that would take two seconds."""
    if ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended[0])


def _answer(options: Options, start: float) -> str:
    """The text to print."""
    with telling(options.verbose) as progress, contextlib.redirect_stdout(sys.stderr), _uncollected():
        progress.doing("importing torch, which takes seconds")
        from autopar.console.command import answer  # torch comes with it, and only a plan is worth the wait
        return answer(options, progress, start)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which is a fifth of the time before a plan and frees next to nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _failed(error: Exception, given: Sequence[str]) -> int:
    """Tell what went wrong, in one line unless more is asked for."""
    if "--verbose" in given:
        traceback.print_exception(error)
    if isinstance(error, Infeasible) and "--json" in given:
        print(json.dumps({"status": "Infeasible", "least_budget_bytes": error.least_budget_bytes,
                          "reason": str(error)}), flush=True)
    if isinstance(error, AutoparError) or _out_of_memory(error):
        told = str(error) if isinstance(error, AutoparError) else NO_MEMORY
        print(f"autopar-solve: error: {_line(told)}", file=sys.stderr)
        return 2
    advice = "" if "--verbose" in given else "; this is a fault of autopar's, --verbose shows where"
    print(f"autopar-solve: error: {_line(f'{type(error).__name__}: {error}')}{advice}", file=sys.stderr)
    return 1


def _out_of_memory(error: Exception) -> bool:
    """Whether this machine had too little memory; torch says so by a RuntimeError."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
