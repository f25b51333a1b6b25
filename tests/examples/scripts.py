"""Start example scripts as a user does, on one or several local ranks."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.paths import PYTHONPATH, ROOT

SECONDS = 240.0


def start(script: str, ranks: int, *arguments: object) -> subprocess.Popen[str]:
    """The launcher of `script` on `ranks` ranks; one rank runs without a launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / "examples" / script), *map(str, arguments)],
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(script: str, ranks: int, *arguments: object) -> tuple[int, str]:
    """The exit code of a script and everything that was printed."""
    process = start(script, ranks, *arguments)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, output
