"""The batch that gives most samples a second within a budget of memory, and the curve that says why.

    python benchmarks/batch_size.py --model gpt2-medium --budget 12GiB --cluster 1xH100 --plot batches.png
    torchrun --standalone --nproc-per-node 1 benchmarks/batch_size.py --model gpt2-medium --budget 12GiB --verify

Of one way to cut a model seconds and bytes of a step are affine in its samples b, and recomputing costs a sample the
more the larger the part of its bytes that has to go:

    seconds(b) = t0 + t1 · b + b · again((m0 + m1 · b − budget) / b),  again convex, a maximum of lines

These are told from six plans (two batches without a budget; at the larger one budgets down to the least), kept as
expressions of sympy, and followed over all batches in no time. The best few are planned for themselves, in full, and
with `--verify` run on the devices at hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.distributed as dist
from memory_budget import WORK, Work, image_loss, ours, plain
from torch import Tensor

import autopar
from autopar.arguments import read_budget, read_cluster
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError, Infeasible
from autopar.launch import local_cluster
from autopar.plan import Plan

MB = 1e6
b = sympy.Symbol("b", positive=True)
APART = 0.05
SHARES = (0.75, 0.5, 0.25, 0.0)
"""The parts of what may be recomputed that the budgets of the pilots leave."""


@dataclass(frozen=True)
class Model:
    """Seconds and bytes a device of a step of b samples a device, and the seconds a sample of dropping bytes of it:
    the largest of some lines (seconds, seconds a byte)."""

    seconds: sympy.Expr
    nbytes: sympy.Expr
    again: tuple[tuple[float, float], ...]
    most_dropped: float

    def within(self, budget: float) -> sympy.Expr:
        """Seconds of a step within a budget, infinite where too little can go."""
        dropped = sympy.Max(0, (self.nbytes - budget) / b)
        lines = [base + slope * dropped for base, slope in self.again]
        within = self.seconds + b * sympy.Max(0, *lines)
        return sympy.Piecewise((within, dropped <= self.most_dropped), (sympy.oo, True))

    def samples_per_s(self, budget: float) -> sympy.Expr:
        """Samples a second on each device."""
        return b / self.within(budget)


def affine(one: tuple[float, float], other: tuple[float, float]) -> sympy.Expr:
    """The line through two points, in b."""
    (x, y), (u, v) = one, other
    slope = (v - y) / (u - x)
    return sympy.Float(y - slope * x) + sympy.Float(slope) * b


def lines_through(points: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The lines (base, slope) of the convex hull from below of points, from (0, 0) on."""
    hull: list[tuple[float, float]] = [(0.0, 0.0)]
    for x, y in sorted(points):
        if x <= hull[-1][0]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-1][0]) >= (
                y - hull[-1][1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    slopes = [((y, x), (v - y) / (u - x)) for (x, y), (u, v) in itertools.pairwise(hull)]
    return tuple((y - slope * x, slope) for (y, x), slope in slopes)


def shaped(work: Work, rows: int) -> dict[str, Tensor]:
    """A batch without values."""
    if work.seq is None:
        return {"x": torch.empty(rows, 3, 224, 224, device="meta"),
                "labels": torch.empty(rows, dtype=torch.int64, device="meta")}
    ids = torch.empty(rows, work.seq, dtype=torch.int64, device="meta")
    return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Planner:
    """Plans of one model on a cluster by samples a device."""

    work: Work
    cluster: Cluster
    mode: str

    def plan(self, batch: int, budget: float) -> Plan:
        """The plan for `batch` samples a device. Raises Infeasible."""
        work, inputs = replace(self.work, batch=batch), shaped(self.work, batch * self.cluster.size)
        images = "x" in inputs
        told = f"planning {batch} samples a device" + (f" within {budget / MB:.0f} MB" if budget < 1e15 else "")
        print(told, file=sys.stderr, flush=True)
        return autopar.plan(plain(work, torch.device("meta"), 0.0), self.cluster, mode=self.mode,
                            inputs=tuple(inputs.values()) if images else inputs, memory_budget=budget,
                            loss_fn=image_loss if images else None)

    def least(self, batch: int) -> float:
        """The least budget, in bytes."""
        try:
            self.plan(batch, 1.0)
        except Infeasible as refused:
            assert refused.least_budget_bytes is not None
            return refused.least_budget_bytes
        raise AssertionError("a byte is enough")


def model_of(planner: Planner, small: int, large: int) -> Model:
    """The predictions of a step by its samples, from pilots of two sizes."""
    first, second = (planner.plan(batch, 1e15) for batch in (small, large))
    seconds = affine((small, first.step_time_s), (large, second.step_time_s))
    nbytes = affine((small, first.memory.device), (large, second.memory.device))
    least, free = planner.least(large), second.memory.device
    points = []
    for budget in (least + share * (free - least) for share in SHARES):
        made = planner.plan(large, budget)
        points.append(((free - made.memory.device) / large, (made.step_time_s - second.step_time_s) / large))
    return Model(seconds, nbytes, lines_through(points), max(0.0, (free - least) / large))


@dataclass(frozen=True)
class Point:
    """Samples a device, and samples a second of all: as told by the expressions, as planned in full, as measured."""

    batch: int
    told: float
    planned: float | None = None
    planned_bytes: float | None = None
    measured: float | None = None
    measured_bytes: float | None = None

    def __str__(self) -> str:
        planned = "" if self.planned is None or self.planned_bytes is None else (
            f", planned {self.planned:.1f} at {self.planned_bytes / MB:.0f} MB")
        seen = "" if self.measured is None or self.measured_bytes is None else (
            f", measured {self.measured:.1f} at {self.measured_bytes / MB:.0f} MB")
        return f"batch {self.batch} a device: {self.told:.1f} samples/s{planned}{seen}"


def curve(model: Model, budget: float, most: int, devices: int) -> list[Point]:
    """The samples a second of every batch that fits."""
    rate = sympy.lambdify(b, model.samples_per_s(budget), "math")
    return [Point(batch, devices * rate(batch)) for batch in range(1, most + 1) if rate(batch) > 0.0]


def planned(planner: Planner, point: Point, budget: float) -> Point:
    """The same with a plan of its own; as it was where that has none."""
    try:
        made = planner.plan(point.batch, budget)
    except Infeasible as refused:
        print(f"batch {point.batch} does not fit after all: {refused}", file=sys.stderr)
        return point
    return replace(point, planned=point.batch * planner.cluster.size / made.step_time_s,
                   planned_bytes=made.memory.device)


def measured(planner: Planner, point: Point, budget: float, device: torch.device) -> Point:
    """The same, run."""
    row = ours(replace(planner.work, batch=point.batch), device, 0.0, budget)
    return replace(point, measured=point.batch * dist.get_world_size() / row.seconds, measured_bytes=row.peak)


def best_of(points: list[Point]) -> Point:
    """The one of most samples a second, by what is known best of it."""
    known = [point for point in points if point.planned is not None]
    if not known:
        raise AutoparError("no batch fits the budget; raise it, or use more devices")
    return max(known, key=lambda point: point.measured or point.planned or 0.0)


def plot(points: list[Point], path: Path, title: str) -> None:
    """Samples a second against the batch."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.plot([p.batch for p in points], [p.told for p in points], "-", label="by expressions")
    for name, style in (("planned", "o"), ("measured", "s")):
        of = [(p.batch, getattr(p, name)) for p in points if getattr(p, name) is not None]
        if of:
            axes.plot(*zip(*of, strict=True), style, label=name)
    axes.set(xlabel="samples a device", ylabel="samples a second", title=title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(WORK), required=True)
    parser.add_argument("--budget", required=True, help="bytes a device, such as 24GiB")
    parser.add_argument("--cluster", help="a preset or a cluster file (default: the devices at hand, under torchrun)")
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--pilots", type=int, nargs=2, default=(2, 8), metavar=("SMALL", "LARGE"),
                        help="samples a device of the plans that predictions are told from (default: 2 8)")
    parser.add_argument("--most", type=int, default=512, help="the largest batch a device (default: 512)")
    parser.add_argument("--top", type=int, default=3, help="how many are planned in full (default: 3)")
    parser.add_argument("--verify", action="store_true", help="run those on the devices at hand, under torchrun")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--out", type=Path, help="write that to a file too")
    parser.add_argument("--plot", type=Path, help="draw the curve")
    return parser.parse_args(arguments)


def told(asked: argparse.Namespace, model: Model, points: list[Point], best: Point) -> dict[str, Any]:
    """Everything found."""
    return {"model": asked.model, "budget_bytes": read_budget(asked.budget), "best": asdict(best),
            "seconds": str(model.seconds), "bytes": str(model.nbytes), "again": model.again,
            "curve": [asdict(point) for point in points]}


def best_apart(points: list[Point], count: int) -> set[int]:
    """The batches of the best points, each some way from the others: neighbours are as good as each other."""
    found: set[int] = set()
    for point in sorted(points, key=lambda point: -point.told):
        if len(found) < count and all(abs(point.batch - each) >= APART * each for each in found):
            found.add(point.batch)
    return found


def at_hand() -> Cluster:
    """The devices of this launch: as measured, a single one, which has no links to measure, as its preset says."""
    return autopar.Cluster.measure() if dist.get_world_size() > 1 else local_cluster(1)


def main(arguments: list[str] | None = None) -> Point:
    """Find the batch of one model."""
    asked = parsed(arguments)
    ranks = "RANK" in os.environ
    if asked.verify or not asked.cluster:
        autopar.init()
    cluster = read_cluster(asked.cluster) if asked.cluster else at_hand()
    planner, budget = Planner(WORK[asked.model], cluster, asked.mode), read_budget(asked.budget)
    model = model_of(planner, *asked.pilots)
    points = curve(model, budget, asked.most, cluster.size)
    top = best_apart(points, asked.top)
    points = [planned(planner, p, budget) if p.batch in top else p for p in points]
    if asked.verify:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        points = [p if p.planned is None else measured(planner, p, budget, device) for p in points]
    best = best_of(points)
    if not ranks or dist.get_rank() == 0:
        for point in (p for p in points if p.planned is not None):
            print(point)
        print(f"best within {budget / MB:.0f} MB of {asked.model} on {cluster.name}: {best}")
        found = json.dumps(told(asked, model, points, best), indent=1)
        if asked.json:
            print(found)
        if asked.out:
            asked.out.write_text(found + "\n")
        if asked.plot:
            plot(points, asked.plot, f"{asked.model} within {budget / MB:.0f} MB on {cluster.name}")
    return best


if __name__ == "__main__":
    try:
        main()
    except AutoparError as error:
        sys.exit(f"batch_size: error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()
