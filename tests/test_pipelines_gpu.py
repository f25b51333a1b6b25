"""Pipelines on GPUs: compiled stages draw the dropout of one rank in any number of micro-batches, and are timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.paths import PYTHONPATH, ROOT
from tests.test_watch import need

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-3
SECONDS = 500.0


def curve(ranks: int, options: dict[str, Any], timeline: Path) -> list[float]:
    """The losses of `tests.dropping` on so many GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
               "tests.dropping", json.dumps(options), str(timeline)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": PYTHONPATH}, capture_output=True,
                          text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


@cache
def alone() -> list[float]:
    return curve(1, {"mode": "ddp"}, Path("/nowhere"))


@pytest.mark.parametrize(("ranks", "options"), [
    (2, {"mode": "pp", "pp": 2, "micro_batches": 1}), (2, {"mode": "pp", "pp": 2, "micro_batches": 2}),
    (2, {"mode": "pp", "pp": 2, "micro_batches": 4}), (4, {"mode": "pp1d", "pp": 2, "tp": 2, "micro_batches": 4}),
    (4, {"mode": "pp", "pp": 4, "micro_batches": 4}), (4, {"mode": "pp+zero", "pp": 2, "micro_batches": 2})], ids=str)
def test_losses_are_those_of_one_gpu(tmp_path: Path, ranks: int, options: dict[str, Any]) -> None:
    need(ranks)
    assert curve(ranks, options, tmp_path / "step.html") == pytest.approx(alone(), abs=TOLERANCE)
    text = (tmp_path / "step.html").read_text()
    assert text.count("<svg") == 2 and "measured: " in text
