"""The drawing of a loss curve."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.examples.scripts import ROOT

Curve = Callable[..., list[str]]


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which the scripts import from beside them."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("display")


def test_curve(display: Any) -> None:
    assert display.curve([3.0, 2.0, 1.0, 1.0], height=3) == [
        "  3.00 |'",
        "       | -",
        "  1.00 |  ..",
        "       +----",
    ]


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1000])
def test_curve_has_one_mark_a_column(display: Any, count: int) -> None:
    *lines, axis = display.curve([math.sin(i / 50) for i in range(count)])
    columns = min(count, 64)
    assert len(axis) == 8 + columns
    marks = [sum(line[8:].ljust(columns)[i] != " " for line in lines) for i in range(columns)]
    assert marks == [1] * columns


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65.9, "1:05"), (6000, "100:00"), (float("nan"), "-:--")])
def test_clock(display: Any, seconds: float, text: str) -> None:
    assert display.clock(seconds) == text
