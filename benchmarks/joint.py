"""How a model is cut and what it keeps, chosen together and one after the other, within budgets.

    python benchmarks/joint.py --model gpt2-medium --cluster 4xH100 --budgets 3 --out joint.json

One after the other: the fastest way to cut the model without a budget, and what fits of it by recomputing. Together: as
`autopar.plan` does. Both are predictions of the same figures; a line a budget, and the largest difference as a claim.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from batch_size import shaped
from memory_budget import WORK, Work, image_loss, plain

from autopar.arguments import read_cluster
from autopar.budget import Lowerings, recomputing
from autopar.core.cluster import Cluster
from autopar.core.errors import Infeasible
from autopar.passes.capture import capture
from autopar.passes.decision import Context
from autopar.planner import Request, decision_of, prepare, solve

GIB = 2.0**30
MOST = 1e15
"""A budget that does not bind, in bytes."""


@dataclass(frozen=True)
class Row:
    """A budget in bytes, and seconds a step by either way; infinite where it finds none."""

    budget: float
    after: float
    together: float
    mesh: str

    @property
    def gain(self) -> float:
        """By what part of the time choosing together is faster."""
        return math.inf if math.isinf(self.after) else self.after / self.together - 1.0

    def __str__(self) -> str:
        after = "no plan" if math.isinf(self.after) else f"{1e3 * self.after:.2f} ms"
        return (f"budget {self.budget / GIB:.2f} GiB: one after the other {after}, together "
                f"{1e3 * self.together:.2f} ms on mesh {self.mesh} ({100 * self.gain:+.2f} %)")


def context_of(work: Work, cluster: Cluster) -> Context:
    """The program of a model on a cluster."""
    inputs = shaped(work, work.batch * cluster.size)
    images = "x" in inputs
    call = (tuple(inputs.values()), {}) if images else ((), inputs)
    program = capture(plain(work, torch.device("meta"), 0.0), call, "bf16-mixed", image_loss if images else None)
    return prepare(program, cluster)


def rows(ctx: Context, cluster: Cluster, request: Request, count: int) -> list[Row]:
    """A row a budget, from the least that choosing together needs up to what is used without one."""
    free, problem = solve(ctx, cluster, replace(request, memory_budget=MOST))
    try:
        solve(ctx, cluster, replace(request, memory_budget=1.0))
        raise AssertionError("a byte is enough")
    except Infeasible as refused:
        assert refused.least_budget_bytes is not None
        least = refused.least_budget_bytes + 1.0
    cut, lowerings, found = decision_of(free, ctx), Lowerings(), []
    for i in range(count):
        budget = least + i / count * (free.memory.device - least)
        try:
            after = recomputing(cut, replace(problem.setting, budget=budget), lowerings, request.solver).priced.seconds
        except Infeasible:
            after = math.inf
        made, _ = solve(ctx, cluster, replace(request, memory_budget=budget))
        found.append(Row(budget, after, made.step_time_s, "x".join(map(str, made.mesh))))
        print(found[-1], flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Compare the two on one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(WORK), required=True)
    parser.add_argument("--cluster", required=True, help="a preset or a cluster file")
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--batch", type=int, help="samples a device")
    parser.add_argument("--budgets", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON too")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    work, cluster = WORK[asked.model], read_cluster(asked.cluster)
    work = replace(work, batch=asked.batch) if asked.batch else work
    print(f"{asked.model}, {work.batch} samples a device, {cluster.name}, mode {asked.mode}", file=sys.stderr)
    found = rows(context_of(work, cluster), cluster, Request(asked.model, asked.mode, stages=1), asked.budgets)
    both = [row.gain for row in found if math.isfinite(row.after)]
    print(f"together at best {100 * max(both, default=0.0):.2f} % faster where both find a plan; one after the other "
          f"finds none for {len(found) - len(both)} of {len(found)} budgets")
    told = json.dumps([asdict(row) for row in found], indent=1)
    if asked.json:
        print(told)
    if asked.out:
        asked.out.write_text(told + "\n")


if __name__ == "__main__":
    main()
