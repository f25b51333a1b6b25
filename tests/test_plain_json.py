"""Plain values through JSON and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autopar.core.errors import AutoparError
from autopar.plain_json import decode, encode

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.lists(inner).map(tuple)
                      | st.dictionaries(KEYS, inner, max_size=3), max_leaves=10)


def there_and_back(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value, "value"))))


@given(VALUES)
def test_comes_back_as_it_was(value: Any) -> None:
    assert repr(there_and_back(value)) == repr(value)


@pytest.mark.parametrize("tensor", [torch.tensor(0.1), torch.arange(6).reshape(2, 3), torch.tensor([True, False]),
                                    torch.randn(3).bfloat16(), torch.empty(0, dtype=torch.uint8)], ids=str)
def test_tensors(tensor: torch.Tensor) -> None:
    found = there_and_back({"x": tensor})["x"]
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, len])
def test_what_is_not_plain_is_named(value: Any) -> None:
    with pytest.raises(AutoparError, match=f"run.a.b holds a {type(value).__name__}"):
        encode({"a": {"b": [value]}}, "run")
