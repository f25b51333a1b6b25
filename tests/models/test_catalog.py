"""Names of models and what is no name."""

from __future__ import annotations

import pytest

from autopar.core.errors import UnknownName
from autopar.models.catalog import FAMILIES, MODELS, check_name, is_reference


@pytest.mark.parametrize("name", [*MODELS, "model.py:build", "path/to/model.py:Build", "model.py"])
def test_names_and_references_pass(name: str) -> None:
    assert check_name(name) == name
    assert is_reference(name) == (name not in MODELS)


@pytest.mark.parametrize("name", ["", "gpt5", "GPT2", "resnet", "model"])
def test_other_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownName) as refusal:
        check_name(name)
    assert repr(name) in str(refusal.value)
    assert all(known in str(refusal.value) for known in [*MODELS, "path/to/file.py:factory"])


def test_every_family_is_used() -> None:
    assert {entry.family for entry in MODELS.values()} == {*FAMILIES, "resnet"}
