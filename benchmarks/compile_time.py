"""Seconds from the start of a process to the end of its first step, with nothing kept from before, and once more.

    python benchmarks/compile_time.py --model gpt2-xl --layers 12 24 48 --ranks 4 --seq 1024 --batch 8

Each row is two launches of as many ranks with a cache folder of their own: the first finds it empty, the second finds
what the first left there: the plan, and what Inductor compiled. Of a launch the parts are told too: importing,
building the model, planning and lowering, and the first step with what it compiles. Claim: both are flat in the number
of layers, since equal layers are planned, lowered and compiled once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

PARTS = ("import", "build", "plan", "step")
LAUNCHES = ("first", "second")


@dataclass(frozen=True)
class Row:
    """A launch of a model of so many layers: the seconds of its parts on rank 0, and of the whole process."""

    model: str
    layers: int
    ranks: int
    launch: str
    parts: dict[str, float]
    seconds: float
    device: str

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {self.parts[name]:.1f}" for name in PARTS)
        return f"{self.model}, {self.layers} layers on {self.ranks}, {self.launch}: {self.seconds:.1f} s ({parts})"


def launched(arguments: argparse.Namespace, layers: int, launch: str, folder: str) -> Row:
    """One launch; raises RuntimeError with what it said last where it fails."""
    environment = {**os.environ, "AUTOPAR_CACHE": f"{folder}/plans", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
                   "TRITON_CACHE_DIR": f"{folder}/triton", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    own = [f"--{name}={getattr(arguments, name)}" for name in ("model", "batch", "seq", "mode", "compiler", "width")]
    start = time.perf_counter()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}",
               __file__, "--worker", f"--layers={layers}", *own]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not told:
        raise RuntimeError(f"exit {done.returncode}: {_reason(done.stderr)}")
    found = json.loads(told[-1])
    return Row(arguments.model, layers, arguments.ranks, launch, found["parts"], seconds, found["device"])


def _reason(said: str) -> str:
    """The exception that ended a rank, else what was said last."""
    raised = [line for line in said.splitlines() if re.match(r"(\[rank\d+\]: *)?[\w.]*(Error|Exception)\b", line)]
    return raised[0] if raised else said[-600:]


def worker(arguments: argparse.Namespace) -> None:
    """One rank of a launch: from its start to the end of a step. Rank 0 prints its parts as JSON."""
    marks = [_process_start(), 0.0]
    import torch
    import torch.distributed as dist

    import autopar
    from autopar.models.registry import build

    marks[1] = time.time()
    autopar.init()
    on_gpu = torch.cuda.is_available()
    (layers,) = arguments.layers
    config = build(arguments.model, 1, arguments.seq).model.config
    sizes = {} if not arguments.width else {"hidden_size": arguments.width, "num_attention_heads": 4}
    config.update({"num_hidden_layers": layers, "use_cache": False, **sizes})
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with autopar.empty():
        model: Any = type(build(arguments.model, 1, arguments.seq).model)(config)
    marks.append(time.time())
    ids = torch.arange(arguments.batch * dist.get_world_size() * arguments.seq).reshape(-1, arguments.seq) % 50000
    given = {"input_ids": ids, "labels": ids}
    model = autopar.compile(model, inputs=given, mode=arguments.mode, batch="global", compiler=arguments.compiler,
                            init="model")
    marks.append(time.time())
    loss = model(**{name: x.cuda() if on_gpu else x for name, x in given.items()}).loss
    loss.backward()
    loss.item()
    marks.append(time.time())
    if dist.get_rank() == 0:
        parts = dict(zip(PARTS, (after - before for before, after in pairwise(marks)), strict=True))
        device = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} x {platform.machine()}"
        print(json.dumps({"parts": parts, "device": f"{device}, torch {torch.__version__}"}), flush=True)
    dist.destroy_process_group()


def _process_start() -> float:
    """When this process began, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    booted = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines()
                  if line.startswith("btime"))
    return booted + ticks / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """The exit status: 0 where every launch ends well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--width", type=int, default=0, help="of the hidden states; the model's own when left out")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1, help="samples a rank (default %(default)s)")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return 0
    rows, failed = [], 0
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(prefix="compile-time-") as folder:
            for launch in LAUNCHES:
                try:
                    rows.append(launched(arguments, layers, launch, folder))
                    print(rows[-1], file=sys.stderr if arguments.json else sys.stdout, flush=True)
                except RuntimeError as error:
                    failed = 1
                    print(f"{arguments.model}, {layers} layers, {launch}: FAILED {error}", file=sys.stderr, flush=True)
    for launch in LAUNCHES:
        took = {row.layers: row.seconds for row in rows if row.launch == launch}
        if len(took) > 1 and not arguments.json:
            ratio = took[max(took)] / took[min(took)]
            print(f"{launch}: {max(took)} layers take {ratio:.2f} x the time of {min(took)}")
    told = json.dumps([asdict(row) for row in rows], indent=1)
    if arguments.json:
        print(told)
    if arguments.out:
        arguments.out.write_text(told + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
