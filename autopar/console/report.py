"""A plan told to people and to programs."""

from __future__ import annotations

import json
import math
from typing import Any

from autopar.comparison import Comparison
from autopar.console.edges import edge_costs
from autopar.explanation import Explanation
from autopar.listing import listing
from autopar.passes.problem import Problem
from autopar.plan import Plan


def as_text(plan: Plan) -> str:
    """What the solver found, one line an op with equal layers once, the summary."""
    lines = [f"ILP Status: {plan.status}  Objective: {plan.seconds.step:.6f} s  Time: {plan.solve_s:.2f} s",
             f"#nodes: {plan.nodes}, #edges: {plan.edges}", listing(plan.ops, plan.parameters), "", plan.summary()]
    return "\n".join(lines)


def as_verbose_text(plan: Plan, problem: Problem) -> str:
    """The costs of the problem's edges, then `as_text`."""
    return f"{edge_costs(problem)}\n\n{as_text(plan)}"


def beside(plan: Plan, solvers: Plan) -> str:
    """A layout by hand beside the solver's."""
    return (f"layout by hand: {1e3 * plan.step_time_s:.3f} ms a step; the solver's: {1e3 * solvers.step_time_s:.3f} "
            f"ms, devices {', '.join(map(str, solvers.pipelining.layout))}")


def as_json(compared: Comparison, total_s: float, explanation: Explanation | None = None,
            solvers: Plan | None = None) -> str:
    """One object: what a plan's file tells, ops that print nothing left out, and what was compared.

    `total_s`: seconds since the command started; `solvers` is the plan beside one whose layout is given.
    """
    told = compared.plan.to_json()
    return json.dumps({
        **told,
        "ops": [op for op in told["ops"] if op["strategy"]],
        "modes": compared.seconds, "modes_reason": compared.reasons, "total_s": total_s,
        **({"layouts": {"by_hand_s": told["step_time_s"], "solver_s": solvers.step_time_s,
                        "solver_devices": solvers.pipelining.layout}} if solvers else {}),
        **({"explanation": explanation_fields(explanation)} if explanation else {}),
    })


def explanation_fields(explanation: Explanation) -> dict[str, Any]:
    """An explanation as plain lists and numbers; seconds are null where a value has no way."""
    alternatives = [{"assignment": a.assignment, "strategy": a.strategy, "planned": a.planned, "memory_bytes": a.nbytes,
                     "step_time_s": a.seconds if math.isfinite(a.seconds) else None} for a in explanation.alternatives]
    return {"op": explanation.op, "times": explanation.times, "alternatives": alternatives}
