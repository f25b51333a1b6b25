"""Objects read from JSON files; whatever is wrong with one is told with the file's name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from autopar.core.errors import AutoparError
from autopar.core.files import read_object
from autopar.core.told import told

Value = TypeVar("Value")


def read_as(what: str, path: object, parse: Callable[[dict[str, Any]], Value]) -> Value:
    """What `parse` makes of the JSON object in the file at `path`, `what` it is meant to be, as in "a plan".

    Raises AutoparError naming the file and what is wrong with it.
    """
    checked = check_path(f"the path of {what}", path)
    try:
        data = read_object(checked)
    except RecursionError:
        raise AutoparError(f"{checked} is not {what}: it holds lists within lists without end") from None
    try:
        return parse(data)
    except (AutoparError, OverflowError) as error:
        raise AutoparError(f"{checked} is not {what}: {error}") from error


def check_path(what: str, path: object) -> str:
    """`path` as a text. Raises AutoparError when it is none, or empty."""
    if isinstance(path, str | os.PathLike) and (text := os.fspath(path)) and isinstance(text, str):
        return text
    raise AutoparError(f"{what} is {told(path)}, needed is a path")
