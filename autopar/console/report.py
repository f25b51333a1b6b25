"""A plan told to people and to programs."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from autopar.comparison import Comparison
from autopar.console.edges import edge_costs
from autopar.console.listing import listing
from autopar.explanation import Explanation
from autopar.passes.problem import Problem
from autopar.plan import Plan

FIELDS = ("status", "gap", "model", "cluster", "mesh", "mode", "precision", "optimizer", "step_time_s", "compute_s",
          "inline_s", "exposed_s", "optimizer_s", "bubble_s", "communication_s", "samples_per_s", "tokens_per_s", "mfu",
          "memory_bytes", "attention", "fallback_ops", "nodes", "edges", "solve_s")
"""The attributes of a plan that its JSON tells, under the same names."""


def as_text(plan: Plan) -> str:
    """What the solver found, one line an op with equal layers once, the summary."""
    lines = [f"ILP Status: {plan.status}  Objective: {plan.seconds.step:.6f} s  Time: {plan.solve_s:.2f} s",
             f"#nodes: {plan.nodes}, #edges: {plan.edges}", listing(plan.ops, plan.parameters), "", plan.summary()]
    return "\n".join(lines)


def as_verbose_text(plan: Plan, problem: Problem) -> str:
    """The costs of the problem's edges, then `as_text`."""
    return f"{edge_costs(problem)}\n\n{as_text(plan)}"


def as_json(compared: Comparison, total_s: float, explanation: Explanation | None = None) -> str:
    """One object: seconds and bytes as numbers, every op and parameter by name, layers written out.

    `total_s`: seconds since the command started.
    """
    plan = compared.plan
    return json.dumps({
        **{name: getattr(plan, name) for name in FIELDS},
        "ops": [{"name": op.name, "strategy": op.strategy, "segment": op.segment} for op in plan.ops if op.strategy],
        "parameters": [dataclasses.asdict(parameter) for parameter in plan.parameters],
        "modes": compared.seconds, "modes_reason": compared.reasons, "total_s": total_s,
        **({"explanation": explanation_fields(explanation)} if explanation else {}),
    })


def explanation_fields(explanation: Explanation) -> dict[str, Any]:
    """An explanation as plain lists and numbers; seconds are null where a value has no way."""
    alternatives = [{"assignment": a.assignment, "strategy": a.strategy, "planned": a.planned, "memory_bytes": a.nbytes,
                     "step_time_s": a.seconds if math.isfinite(a.seconds) else None} for a in explanation.alternatives]
    return {"op": explanation.op, "times": explanation.times, "alternatives": alternatives}
