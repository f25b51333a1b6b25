"""Values in messages: one line, short, with their type."""

from __future__ import annotations

import pytest

from autopar.core.told import MOST, told


class Silent:
    def __repr__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(("value", "said"), [
    (3, "3, of type int"), (None, "None, of type NoneType"), ("a\nb", "'a\\nb', of type str"),
    ("x" * 200, "'" + "x" * (MOST - 4) + "..., of type str"),
    (Silent(), "a value that can't be printed, of type Silent"),
])
def test_one_line(value: object, said: str) -> None:
    assert told(value) == said
