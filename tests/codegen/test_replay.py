"""Recorded steps train as the plain model does, on as many GPUs as there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.paths import PYTHONPATH, ROOT

MODES = ("ddp", "zero3", "1d", "2d")


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_recorded_steps_train_as_the_plain_model(ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{torch.cuda.device_count()} GPUs, needed are {ranks}")
    modes = [mode for mode in MODES if mode != "2d" or ranks == 4]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
               "tests.codegen.replaying", *modes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
                          env=os.environ | {"PYTHONPATH": PYTHONPATH})
    assert done.returncode == 0, done.stderr[-3000:]
    for row in json.loads(done.stdout.splitlines()[-1]):
        assert row["recorded"] == 1, row
        assert row["losses"] < 1e-4 and row["moved"] < 2e-4, row
        assert 'compiler="inductor"' in row["refused"], row
