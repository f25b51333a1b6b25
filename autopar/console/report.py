"""A plan told to people and to programs."""

from __future__ import annotations

import dataclasses
import json

from autopar.console.edges import edge_costs
from autopar.passes.problem import Problem
from autopar.plan import Plan


def as_text(plan: Plan) -> str:
    """What the solver found, one line an op, the summary."""
    lines = [f"ILP Status: {plan.status}  Objective: {plan.seconds.step:.6f} s  Time: {plan.solve_seconds:.2f} s",
             f"#nodes: {plan.nodes}, #edges: {plan.edges}", str(plan)]
    return "\n".join(lines)


def as_verbose_text(plan: Plan, problem: Problem) -> str:
    """The costs of the problem's edges, then `as_text`."""
    return f"{edge_costs(problem)}\n\n{as_text(plan)}"


def as_json(plan: Plan, total_s: float) -> str:
    """One object: seconds and bytes as numbers, every op by name. `total_s`: seconds since the command started."""
    seconds, memory = plan.seconds, plan.memory
    return json.dumps({
        "status": plan.status, "gap": plan.gap, "model": plan.model, "cluster": plan.cluster, "mesh": plan.mesh,
        "mode": plan.mode, "precision": plan.precision, "optimizer": plan.optimizer, "step_time_s": seconds.step,
        "compute_s": seconds.compute, "inline_s": seconds.inline, "exposed_s": seconds.exposed,
        "optimizer_s": seconds.optimizer, "memory_bytes": {**dataclasses.asdict(memory), "total": memory.total},
        "ops": [{"name": op.name, "strategy": op.strategy, "segment": op.segment} for op in plan.ops if op.strategy],
        "attention": plan.attention or None, "fallback_ops": plan.fallback_ops, "nodes": plan.nodes,
        "edges": plan.edges, "solve_s": plan.solve_seconds, "total_s": total_s,
    })
