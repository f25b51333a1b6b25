"""What a step's time is spent on, for autopar and a row written by hand side by side.

    torchrun --standalone --nproc-per-node 4 benchmarks/where.py gpt2-xl-8x1024 --way "zero2 cudnn"

From a profile of rank 0: milliseconds a step in kernels by kind, collectives that show and that hide behind kernels,
and gaps in which the device waits for its host. `--kernels N` lists the N longest kernels by name.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from hand import WAYS
from throughput import WARMUP, WORK, automatic, by_hand, say, seconds
from torch.profiler import ProfilerActivity, profile

import autopar

STEPS = 3
KINDS = (
    ("collectives", ("nccl",)),
    ("attention", ("flash", "fmha", "attention", "cudnn_generated")),
    ("convolution", ("conv", "wgrad", "dgrad", "implicit")),
    ("matmul", ("gemm", "cutlass", "nvjet", "cublas", "matmul", "splitk")),
    ("optimizer", ("adam", "multi_tensor", "foreach")),
    ("copies", ("memcpy", "memset", "copy", "cat", "chunk", "split")),
    ("compiled pointwise", ("triton",)),
)
"""Kinds of kernels, in the order they are looked for in a name; all else is `other`."""
Interval = tuple[float, float]


@dataclass(frozen=True)
class Spent:
    """Milliseconds a step: kernels by kind, collectives that show, all that runs, the step."""

    kinds: dict[str, float]
    exposed: float
    busy: float
    step: float
    longest: tuple[tuple[str, float, int], ...]

    @property
    def idle(self) -> float:
        """Milliseconds in which nothing runs."""
        return self.step - self.busy


def kind_of(name: str) -> str:
    """The kind of the kernel called `name`."""
    low = name.lower()
    return next((kind for kind, words in KINDS if any(word in low for word in words)), "other")


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time without overlaps, in order."""
    merged: list[list[float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return [(start, end) for start, end in merged]


def length(intervals: Iterable[Interval]) -> float:
    """Their time, overlaps counted once."""
    return sum(end - start for start, end in union(intervals))


def spent(step: Callable[[], None], trace: str) -> Spent:
    """A profile of some steps."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        took = seconds(step, STEPS)
    found: dict[str, list[Interval]] = defaultdict(list)
    names: dict[str, list[float]] = defaultdict(list)
    if trace and dist.get_rank() in (0, dist.get_world_size() - 1):
        profiled.export_chrome_trace(f"{trace}-{dist.get_rank()}.json.gz")
    for event in profiled.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            found[kind_of(event.name)].append((event.time_range.start, event.time_range.end))
            names[event.name].append(event.time_range.end - event.time_range.start)
    computing = [interval for kind, all_of in found.items() if kind != "collectives" for interval in all_of]
    busy = length([*computing, *found["collectives"]])
    per_step = 1e-3 / STEPS
    longest = sorted(names, key=lambda name: -sum(names[name]))
    return Spent({kind: per_step * length(all_of) for kind, all_of in found.items()},
                 per_step * (busy - length(computing)), per_step * busy, 1e3 * sum(took) / STEPS,
                 tuple((name, per_step * sum(names[name]), len(names[name]) // STEPS) for name in longest))


def table(sides: dict[str, Spent], kernels: int) -> str:
    """A column a side."""
    rows = [(kind, [side.kinds.get(kind, 0.0) for side in sides.values()]) for kind, _ in (*KINDS, ("other", ()))]
    rows += [("collectives that show", [side.exposed for side in sides.values()]),
             ("nothing runs", [side.idle for side in sides.values()]),
             ("step, profiled", [side.step for side in sides.values()])]
    lines = [f"{'ms a step':<24}" + "".join(f"{name:>16}" for name in sides)]
    lines += [f"{kind:<24}" + "".join(f"{value:>16.1f}" for value in values) for kind, values in rows]
    for name, side in sides.items():
        lines += [f"{name}: {milliseconds:7.2f} ms x {count:<4} {kernel[:110]}"
                  for kernel, milliseconds, count in side.longest[:kernels]]
    return "\n".join(lines)


def main() -> None:
    """Profile both sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", choices=WORK)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--cluster")
    parser.add_argument("--kernels", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trace", default="", help="where to write what Perfetto shows, of the first and last rank")
    arguments = parser.parse_args()
    autopar.init()
    device, work = torch.device("cuda", torch.cuda.current_device()), WORK[arguments.work]
    sides = {}
    step, _ = automatic(work, arguments, device)
    for name, made in (("autopar", lambda: step), (arguments.way, lambda: by_hand(work, WAYS[arguments.way], device))):
        if name:
            running = made()
            seconds(running, WARMUP)
            sides[name] = spent(running, arguments.trace and f"{arguments.trace}-{name.split()[0]}")
            gc.collect()
    say(table(sides, arguments.kernels))
    if arguments.out and dist.get_rank() == 0:
        arguments.out.write_text(json.dumps({name: vars(side) for name, side in sides.items()}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
