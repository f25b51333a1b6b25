"""GPT-3 175B on A100-40GB: what is planned, beside configurations that were published, as the same prices have them.

    python benchmarks/known.py --out benchmarks/results/known.md

Every row has the batch of 192 samples of 2,048 tokens. A published row fixes stages and the mesh of a stage; its
micro-batches, and what its stages recompute, are the best that there are. ZeRO-3 with offload to the host is priced as
if a device held all of it and nothing went to the host, which is less than it takes. Published: 38.5 s and 43.1 s on
128 devices.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planning import machine

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.core.files import write_whole
from autopar.models.registry import build
from autopar.passes.capture import capture
from autopar.planner import Request, prepare, solve

GIB = 2.0**30
BATCH, TOKENS = 192, 2048
PUBLISHED_S = (38.5, 43.1)
"""Seconds a step on 128 devices."""


@dataclass(frozen=True, slots=True)
class Row:
    """A configuration on hosts of eight devices; without stages and mesh, one that is planned."""

    name: str
    hosts: int
    mode: str
    stages: int | None = None
    mesh: tuple[int, ...] | None = None
    budget: float | None = None


ROWS = (
    Row("planned, 96", 12, "pp1d"), Row("TP4 x PP24", 12, "pp1d", 24, (1, 4)),
    Row("2D TP4 x PP24", 12, "pp2d", 24, (2, 2)), Row("2.5D TP8 x PP12", 12, "pp2.5d", 12, (2, 2, 2)),
    Row("ZeRO-3, as if it fitted", 12, "zero3", budget=1e13),
    Row("planned, 128", 16, "pp1d"), Row("TP4 x PP32", 16, "pp1d", 32, (1, 4)),
    Row("planned, 64", 8, "pp1d"), Row("ZeRO-3, as if it fitted, 64", 8, "zero3", budget=1e13),
    Row("planned, 1,024", 128, "pp1d"),
)


@dataclass(frozen=True, slots=True)
class Priced:
    """What a row came to: seconds a step, how it is cut, GiB a device, the gap, CPU seconds of solving; or why not."""

    name: str
    devices: int
    step_s: float | None = None
    cut: str = ""
    gib: float = 0.0
    gap: float = 0.0
    solve_cpu_s: float = 0.0
    refusal: str = ""

    def line(self) -> str:
        """One line of the table."""
        if self.step_s is None:
            return f"| {self.name} | {self.devices} | none | {self.refusal} | | | {self.solve_cpu_s:.1f} |"
        return (f"| {self.name} | {self.devices} | {self.step_s:.2f} | {self.cut} | {self.gib:.1f} | "
                f"{100 * self.gap:.2f} % | {self.solve_cpu_s:.1f} |")


HEADER = ("| row | devices | step s | cut | GiB | gap | CPU s of solving |",
          "| --- | --- | --- | --- | --- | --- | --- |")


def price(row: Row) -> Priced:
    """Plan one row; the model is traced anew, which is not counted."""
    built = build("gpt3-175b", BATCH, TOKENS)
    cluster = Cluster.preset(f"{row.hosts}x8xA100-40GB")
    context = prepare(capture(built.model, built.call, "bf16-mixed", built.loss_fn), cluster)
    start = time.process_time()
    try:
        plan, _ = solve(context, cluster, Request("gpt3-175b", row.mode, row.mesh, stages=row.stages,
                                                  memory_budget=row.budget))
    except AutoparError as refusal:
        return Priced(row.name, cluster.size, solve_cpu_s=time.process_time() - start, refusal=str(refusal))
    mesh = "x".join(map(str, plan.mesh))
    cut = f"{max(1, len(plan.stages))} stages x {mesh}, {plan.micro_batches} micro-batches"
    return Priced(row.name, cluster.size, plan.step_time_s, cut, plan.memory.total / GIB, plan.gap,
                  time.process_time() - start)


def claims(found: list[Priced]) -> list[str]:
    """On each number of devices the plan beside the best published row."""
    said = []
    for devices in sorted({each.devices for each in found}):
        planned = [each.step_s for each in found if each.devices == devices and each.name.startswith("planned")]
        others = [each.step_s for each in found if each.devices == devices and not each.name.startswith("planned")
                  and each.step_s is not None]
        if planned and planned[0] is not None and others:
            said.append(f"{devices} devices: planned {planned[0]:.2f} s, the best published row {min(others):.2f} s: "
                        f"{'no published row is better' if planned[0] <= min(others) * (1 + 1e-9) else 'NOT met'}")
    return [*said, f"published on 128 devices: {' and '.join(f'{s} s' for s in PUBLISHED_S)}"]


def main() -> None:
    """Print the table, and write it beside what made it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name contains this (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the table")
    parser.add_argument("--out", type=Path, help="also write the table, with command and machine, to this file")
    options = parser.parse_args()
    shown: Any = sys.stderr if options.json else sys.stdout
    where, found = machine(), list[Priced]()
    print("\n".join([where, "", *HEADER]), file=shown, flush=True)
    for row in (row for row in ROWS if options.only in row.name):
        found.append(price(row))
        print(found[-1].line(), file=shown, flush=True)
    said = claims(found)
    print("\n".join(["", *said]), file=shown)
    if options.json:
        print(json.dumps({"machine": where, "rows": [asdict(each) for each in found], "claims": said}))
    if options.out:
        write_whole(options.out, "\n".join([
            "# GPT-3 175B, batch 192, on A100-40GB, as predicted", "", f"Machine: {where}.", "", "```",
            f"python benchmarks/known.py {shlex.join(sys.argv[1:])}", "```", "", *HEADER,
            *(each.line() for each in found), "", *said, ""]))


if __name__ == "__main__":
    main()
