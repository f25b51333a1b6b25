"""Written programs come to the loss and the gradients of the plan's own step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.codegen.source.cases import SEED, Figures, both, planned

pytestmark = pytest.mark.dist
ON_TWO = [("gpt2", "1d"), ("gpt2", "zero2"), ("gpt2", "zero3"), ("gpt2", "sequence"), ("dropout", "1d"),
          ("dropout", "zero3"), ("dropout", "sequence"), ("odd", "zero3"), ("resnet", "ddp"), ("resnet", "zero3"),
          ("llama", "sequence")]
ON_FOUR = [("gpt2", "zero+1d"), ("llama", "zero+1d"), ("dropout", "zero+1d"), ("gpt2", "2d")]
QUICK = [("dropout", "zero3"), ("resnet", "ddp")]


def assert_close(found: Figures, expected: Figures) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize(("name", "mode"), [
    case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in ON_TWO])
def test_on_two_ranks(pool: Any, tmp_path: Path, name: str, mode: str) -> None:
    for expected, found in pool(2).run(both, name, {"mode": mode}, str(tmp_path)):
        assert_close(found, expected)


def test_with_the_head_in_chunks(pool: Any, tmp_path: Path) -> None:
    for expected, found in pool(2).run(both, "gpt2", {"mode": "1d", "head": "chunked"}, str(tmp_path)):
        assert_close(found, expected)
    assert "rank.linear_cross_entropy(" in (tmp_path / "step.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), ON_FOUR)
def test_on_a_mesh_of_two_by_two(pool: Any, tmp_path: Path, name: str, mode: str) -> None:
    for expected, found in pool(4).run(both, name, {"mode": mode, "mesh": (2, 2)}, str(tmp_path)):
        assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero3", "1d"])
def test_in_mixed_precision(pool: Any, tmp_path: Path, mode: str) -> None:
    for expected, found in pool(2).run(both, "gpt2", {"mode": mode, "precision": "bf16-mixed"}, str(tmp_path)):
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        assert found[1] == pytest.approx(expected[1], rel=1e-4)


def launched(folder: Path, ranks: int, *options: str) -> subprocess.CompletedProcess[str]:
    """The written program under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "step.py",
               *options]
    return subprocess.run(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=240)


def figures_of(said: str) -> Figures:
    found = re.findall(r"^loss (\S+), gradient norm (\S+)$", said, re.MULTILINE)
    assert len(found) == 1, said
    return float(found[0][0]), float(found[0][1])


@pytest.mark.parametrize(("name", "mode", "ranks"), [
    ("gpt2", "zero3", 2), pytest.param("resnet", "ddp", 2, marks=pytest.mark.slow),
    pytest.param("dropout", "sequence", 2, marks=pytest.mark.slow),
    pytest.param("llama", "zero+1d", 4, marks=pytest.mark.slow)])
def test_under_torchrun(pool: Any, tmp_path: Path, name: str, mode: str, ranks: int) -> None:
    options = {"mode": mode, "mesh": (2, 2) if ranks == 4 else None}
    expected = pool(ranks).run(planned, name, options, str(tmp_path))[0]
    ended = launched(tmp_path, ranks, "--state", "state.safetensors", "--inputs", "inputs.safetensors", "--seed",
                     str(SEED))
    assert ended.returncode == 0, ended.stderr
    assert_close(figures_of(ended.stdout), expected)
