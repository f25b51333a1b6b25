"""Files that appear whole or not at all, and JSON that says what is wrong with it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from autopar.core.errors import AutoparError

Value = TypeVar("Value")


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` beside `path`, then move it there. Raises AutoparError, leaving what was there untouched."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise AutoparError(f"cannot write {target}: {error.strerror}; choose a folder that can be written") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in the file at `path`. Raises AutoparError when there is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise AutoparError(f"cannot read {path}: {error.strerror}; check the name, or make the file first") from error
    except ValueError as error:
        raise AutoparError(f"{path} is not JSON ({error}): it is cut short or another kind of file") from error
    if not isinstance(found, dict):
        raise AutoparError(f"{path} holds a {type(found).__name__}, needed is an object {{...}}")
    return found


def entry(table: Mapping[str, Any], name: str, kind: type[Value]) -> Value:
    """`table[name]` as a `kind`. Raises AutoparError when it is missing or of another kind."""
    if name not in table:
        raise AutoparError(f"{name!r} is missing; found are {', '.join(map(repr, table)) or 'no entries'}")
    return typed(repr(name), table[name], kind)


def entries(table: Mapping[str, Any], name: str, kind: type[Value]) -> tuple[Value, ...]:
    """The list `table[name]`, each of its values a `kind`. Raises AutoparError as `entry` does."""
    return tuple(typed(f"{name}[{i}]", value, kind) for i, value in enumerate(entry(table, name, list)))


def typed(what: str, value: Any, kind: type[Value]) -> Value:
    """`value`, checked to be a `kind`; a whole number is also a float, a bool never a number."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise AutoparError(f"{what} is {value!r}, needed is one of type {kind.__name__}")


def save_figure(figure: Any, path: Path, remedy: str) -> None:
    """Save a matplotlib figure whole or not at all, as PNG where `path` has no suffix. Raises AutoparError."""
    draft = path.with_name(f".{path.stem}.draft{path.suffix or '.png'}")
    try:
        figure.savefig(draft, dpi=120)
        draft.replace(path)
    except (OSError, ValueError) as error:
        raise AutoparError(f"cannot draw to {path}: {error}; {remedy}") from error
    finally:
        draft.unlink(missing_ok=True)
