"""How long planning takes: each row is `autopar-solve ... --json` as a fresh process, beside its goal and a peer.

    python benchmarks/planning.py --runs 3 --out benchmarks/results/planning.md

Wall seconds are medians from process start to exit, memory is the process's largest resident set, and no plan of an
earlier run is taken up again. `--json` also solves every other mode to compare; `plan s` is the wall of the same
command without it. The peer is meta-pytorch/autoparallel, whose figures were measured once on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.core.files import write_whole
from autopar.plan_cache import FOLDER

GIB = 2.0**30
LONGEST_S = 600
"""A run that takes longer is ended and reported as failed."""
TOLD = ("status", "gap", "mesh", "step_time_s", "solve_s", "total_s", "modes")


@dataclass(frozen=True, slots=True)
class Row:
    """One planning job; goals in wall seconds and GiB, and what the peer needs for it."""

    name: str
    arguments: str
    goal_s: float
    goal_gib: float
    peer: str


ROWS = (
    Row("GPT-2 124M, mesh (4,2)", "--model gpt2 --cluster 8xA100-80GB --mesh 4x2 --batch 64 --seq 1024", 6, 1.0,
        "71.5 s, 1.5 GiB"),
    Row("Llama-8B, mesh (8,8)", "--model llama-8b --cluster 8x8xH100 --mesh 8x8 --batch 64 --seq 4096", 10, 1.5,
        "122 s, 4.2 GiB"),
    Row("Llama-8B, mesh (32,8)", "--model llama-8b --cluster 32x8xH100 --mesh 32x8 --batch 256 --seq 4096", 10, 1.5,
        "137 s"),
    Row("GPT-2 two layers, mesh (2,2,2)",
        f"--model {Path(__file__).name}:two_layers --cluster 8xA100-80GB --mesh 2x2x2 --batch 64", 8, 1.5,
        "> 900 s, ended"),
    Row("GPT-2 124M, mesh (2,2,2)", "--model gpt2 --cluster 8xA100-80GB --mesh 2x2x2 --batch 64 --seq 1024", 8, 1.5,
        "-"),
    Row("ResNet-50, 4 devices", "--model resnet50 --cluster 4xA100-80GB --batch 256", 10, 1.5, "fails"),
    Row("GPT-3 175B, 1,024 devices, mesh shapes searched",
        "--model gpt3-175b --cluster 128x8xA100-80GB --batch 512", 15, 1.5, "not possible"),
    Row("GPT-2 XL, 48 layers, recomputing", "--model planning.py:forty_eight_layers --cluster 1xH100 --batch 8 "
        "--memory-budget 36GiB", 10, 1.5, "-"),
    Row("the same with 96 layers", "--model planning.py:ninety_six_layers --cluster 1xH100 --batch 8 "
        "--memory-budget 72GiB", 10, 1.5, "-"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One process: wall seconds, peak resident bytes, and of the JSON it printed, if any, the fields TOLD."""

    seconds: float
    resident: float
    told: dict[str, Any]


def two_layers(batch: int = 64) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """GPT-2 124M with two layers, on meta."""
    return _gpt2(batch, n_layer=2)


def forty_eight_layers(batch: int = 8) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """GPT-2 XL, on meta."""
    return _gpt2(batch, n_layer=48, **XL)


def ninety_six_layers(batch: int = 8) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """GPT-2 XL with twice its layers, on meta."""
    return _gpt2(batch, n_layer=96, **XL)


XL = {"n_embd": 1600, "n_head": 25, "vocab_size": 50304}


def _gpt2(batch: int, **settings: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(use_cache=False, **settings))
        tokens = torch.zeros(batch, 1024, dtype=torch.long)
    return model, {"input_ids": tokens, "labels": tokens}


def run(arguments: Sequence[str]) -> Run:
    """Plan in a fresh process. Raises RuntimeError with what it said when it fails, or takes longer than LONGEST_S."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "autopar.cli", *arguments], stdout=out, stderr=errors,
                                   cwd=Path(__file__).parent, env={**os.environ, FOLDER: "off"})
        process.returncode, usage = _ended(process.pid, start)
        seconds = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            said = " ".join(errors.read().decode().split())
            raise RuntimeError(f"status {process.returncode} after {seconds:.0f} s: {said[-300:]}")
        printed = out.read().decode()
    scale = 1 if sys.platform == "darwin" else 1024
    told = json.loads(printed) if "--json" in arguments else {}
    return Run(seconds, scale * usage.ru_maxrss, {name: told[name] for name in TOLD if name in told})


def _ended(pid: int, start: float) -> tuple[int, Any]:
    """Exit status and resource usage of a child; it is ended when its time is over."""
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage
        if time.perf_counter() - start > LONGEST_S:
            os.kill(pid, 9)
            return -9, os.wait4(pid, 0)[2]
        time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Measured:
    """A row's runs with `--json`, the wall seconds of those without, and what went wrong."""

    name: str
    command: str
    runs: tuple[Run, ...]
    plain_s: tuple[float, ...]
    failure: str = ""

    def line(self, row: Row) -> str:
        """One line of the table: medians, the largest resident set, the plan of the last run."""
        if self.failure:
            return _line([self.name, f"FAILED: {self.failure}"])
        walls, told = [r.seconds for r in self.runs], self.runs[-1].told
        wall, resident = statistics.median(walls), max(r.resident for r in self.runs) / GIB
        solve, total = (statistics.median(r.told[name] for r in self.runs) for name in ("solve_s", "total_s"))
        met = "yes" if wall <= row.goal_s and resident <= row.goal_gib else "no"
        return _line([self.name, f"{wall:.1f} ({min(walls):.1f}-{max(walls):.1f})",
                      f"{statistics.median(self.plain_s):.1f}", f"{solve:.2f}", f"{total:.1f}", f"{resident:.2f}",
                      f"{100 * told['gap']:.3f} %", "x".join(map(str, told["mesh"])),
                      f"{1e3 * told['step_time_s']:.2f}", f"{row.goal_s:g} s, {row.goal_gib:g} GiB", met, row.peer])


HEADER = ("work", "wall s", "plan s", "solve_s", "total_s", "peak GiB", "gap", "mesh", "step ms", "goal", "met", "peer")


def measured(row: Row, runs: int) -> Measured:
    """Run a row's command with `--json`, and without."""
    given, command = shlex.split(row.arguments), f"autopar-solve {row.arguments}"
    try:
        return Measured(row.name, command, tuple(run([*given, "--json"]) for _ in range(runs)),
                        tuple(run(given).seconds for _ in range(runs)))
    except RuntimeError as failure:
        return Measured(row.name, command, (), (), str(failure))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def machine() -> str:
    """What this runs on."""
    model = next((line.partition(":")[2].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")),
                 platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    return (f"{cores} cores of {model or platform.machine()}, load {os.getloadavg()[0]:.1f} at the start, Python "
            f"{platform.python_version()}, torch {torch.__version__}, OMP_NUM_THREADS {threads}, "
            f"{time.strftime('%Y-%m-%d')}")


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    """Print the table, and write it beside what made it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="processes of each kind a row (default: 3)")
    parser.add_argument("--only", default="", help="rows whose name contains this (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the table")
    parser.add_argument("--out", type=Path, help="also write the table, with command and machine, to this file")
    options = parser.parse_args()
    shown = sys.stderr if options.json else sys.stdout
    where, rows = machine(), [row for row in ROWS if options.only in row.name]
    print("\n".join([where, "", _line(HEADER), _line("---" for _ in HEADER)]), file=shown, flush=True)
    found = []
    for row in rows:
        found.append(measured(row, options.runs))
        print(found[-1].line(row), file=shown, flush=True)
    if options.json:
        print(json.dumps({"machine": where, "rows": [asdict(each) for each in found]}))
    if options.out:
        lines = [_line(HEADER), _line("---" for _ in HEADER), *map(Measured.line, found, rows)]
        commands = [f"python benchmarks/planning.py {shlex.join(sys.argv[1:])}", *(each.command for each in found)]
        write_whole(options.out, "\n".join(["# Planning, process start to exit", "", f"Machine: {where}.", "", "```",
                                            *commands, "```", "", *lines, ""]))


if __name__ == "__main__":
    main()
