"""Jobs share the GPUs, end in time, and say how they ended."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from autopar.core.errors import AutoparError
from benchmarks import batch
from benchmarks.batch import Batch, Job, jobs_of

LIST = Path(__file__).parents[1] / "benchmarks" / "four_gpus.toml"


def test_what_becomes_of_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "POLL_SECONDS", 0.05)
    jobs = [Job("first", "echo $CUDA_VISIBLE_DEVICES; sleep 0.5", 3, 20),
            Job("second", "echo on $CUDA_VISIBLE_DEVICES; exit 3", 1, 20), Job("long", "sleep 60", 1, 0.2),
            Job("alone", "ls {out}", 4, 20, alone=True), Job("last", "sleep 60", 1, 90)]
    made = Batch(tmp_path, 4, time.monotonic() + 3, jobs)
    made.run()
    assert {name: how for name, (how, _) in made.told.items()} == {
        "first": "done", "second": "exit 3", "long": "out of time", "alone": "done", "last": "out of time"}
    said = made.summary()
    assert "0,1,2" in said and "on 3" in said and "second.log" in said
    assert list(made.told).index("alone") == 3, "by itself, after those before it"


def test_lists_that_can_not_be(tmp_path: Path) -> None:
    assert {job.gpus for job in jobs_of(LIST, [], 4)} == {1, 2, 4}
    with pytest.raises(AutoparError, match="no job is called none"):
        jobs_of(LIST, ["none"], 4)
    with pytest.raises(AutoparError, match="takes 4 GPUs, this machine has 2"):
        jobs_of(LIST, ["lost-four"], 2)
    (wrong := tmp_path / "wrong.toml").write_text("[[job]]\nname = 3\n")
    with pytest.raises(AutoparError, match="no list of jobs"):
        jobs_of(wrong, [], 4)
