"""The ResNet example learns, under a plan, on two ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autopar.checkpoint import latest
from tests.examples.scripts import run

pytestmark = pytest.mark.dist


def test_learns_digits(tmp_path: Path) -> None:
    code, output = run("train_resnet.py", 2, "--steps", 40, "--batch", 32, "--save", tmp_path)
    assert code == 0, output
    found = re.search(r"^loss \S+ -> \S+, (\S+) % of held-out digits right, [\d,]+ images/s$", output, re.MULTILINE)
    assert found, output
    assert float(found[1]) > 50
    assert output.count("step    40   ") == 1
    assert latest(tmp_path) is not None
