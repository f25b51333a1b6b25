"""The GPT example: trains, goes on where it stopped, and ends when it is told to or a rank dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from autopar.checkpoint import HEAD, latest, parse_head
from autopar.core.files import read_object
from autopar.plan import Plan
from tests.examples.scripts import SECONDS, run, start

pytestmark = pytest.mark.dist

SMALL = ("--layers", 1, "--width", 32, "--batch", 4, "--seq", 16, "--lr", 0.01)
TOLERANCE = 1e-4
CHILDREN = "/proc/{0}/task/{0}/children"


def losses(folder: Path) -> list[float]:
    """The curve in the newest checkpoint of a run."""
    newest = latest(folder)
    assert newest is not None
    found: list[float] = parse_head(read_object(newest / HEAD)).progress["losses"]
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of 8 steps on two ranks, and what it printed."""
    folder: Path = tmp_path_factory.mktemp("gpt")
    code, output = run("train_gpt2.py", 2, *SMALL, "--mode", "ddp", "--steps", 8, "--save", folder,
                       "--plan-out", folder / "plan.json")
    assert code == 0, output
    return folder, output


def test_trains_and_prints_everything_once(two_ranks: tuple[Path, str]) -> None:
    folder, output = two_ranks
    assert re.search(r"^loss \d\.\d\d -> \d\.\d\d, validation \d\.\d\d, [\d,]+ tokens/s$", output, re.MULTILINE), output
    for once in ("model  GPT2LMHeadModel", "plan   mode ddp, mesh 2 of cpu:2",
                 "transformer_h_0_attn_c_attn  S0R = S0R X RR", "step     8   validation"):
        assert output.count(once) == 1, output
    assert "warn" not in output.lower(), output
    assert Plan.load(folder / "plan.json").mode == "ddp"


def test_same_curve_on_one_rank_and_resumes_there(two_ranks: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = two_ranks
    code, output = run("train_gpt2.py", 1, *SMALL, "--mode", "zero3", "--steps", 8, "--save", tmp_path)
    assert code == 0, output
    assert losses(tmp_path) == pytest.approx(losses(folder), abs=TOLERANCE)
    code, output = run("train_gpt2.py", 1, *SMALL, "--steps", 10, "--resume", folder, "--save", tmp_path)
    assert "going on from step 8" in output
    assert losses(tmp_path)[:8] == losses(folder)
    assert len(losses(tmp_path)) == 10


def test_bad_input_is_told_in_one_line() -> None:
    code, output = run("train_gpt2.py", 1, "--width", 33)
    assert (code, output) == (2, "train_gpt2.py: --width is 33, needed is a multiple of 32\n")


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run on two ranks that has made its first step."""
    process = start("train_gpt2.py", 2, *SMALL, "--minutes", 10, "--save", tmp_path)
    assert process.stdout is not None
    try:
        while not (line := process.stdout.readline()).startswith("step     1"):
            assert line, "the run ended before its first step"
        yield process
    finally:
        process.kill()
        process.stdout.close()


def test_ctrl_c_ends_in_order(endless: subprocess.Popen[str], tmp_path: Path) -> None:
    endless.send_signal(signal.SIGINT)
    output, _ = endless.communicate(timeout=SECONDS)
    assert "stopped by Ctrl-C: loss" in output
    assert output.count("Traceback") == 1  # the launcher's own
    assert latest(tmp_path) is not None


@pytest.mark.slow  # tests/test_watch.py loses ranks that no launcher started
@pytest.mark.skipif(not Path(CHILDREN.format(os.getpid())).exists(), reason="needs Linux's list of child processes")
def test_the_death_of_a_rank_ends_all(endless: subprocess.Popen[str]) -> None:
    ranks = [int(pid) for pid in Path(CHILDREN.format(endless.pid)).read_text().split()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = endless.communicate(timeout=60.0)
    assert endless.returncode == 1
    assert "Signal 9 (SIGKILL)" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
