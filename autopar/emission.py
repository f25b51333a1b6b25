"""A plan's program as Python to read and to run."""

from __future__ import annotations

from pathlib import Path

import torch

from autopar.arguments import ClusterLike
from autopar.codegen.arrivals import input_specs
from autopar.codegen.executable import build, offline
from autopar.codegen.lower import Target
from autopar.codegen.source.program import Title, program_text
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh
from autopar.passes.capture import Program
from autopar.passes.decision import Context, batch_axes
from autopar.plan import Plan
from autopar.planner import check_one_stage, decision_of, origin_of, setting_of


def text_of(plan: Plan, program: Program | Context, cluster: ClusterLike, path: str) -> str:
    """The text of a file at `path` that runs the plan's program, every rank bringing its part of the samples.

    Raises AutoparError when the plan is for another model or cluster.
    """
    ctx, place = origin_of(plan, program, cluster)
    check_one_stage(plan, "written as a program")
    decision, setting = decision_of(plan, ctx), setting_of(plan, place)
    if decision.kept:
        raise AutoparError("the plan recomputes to stay within its budget, and written programs keep all that their "
                           "backward needs; plan with a larger memory_budget to write it")
    executable = build(Target(decision, offline(setting.mesh), setting.price, torch.device("meta"),
                              input_specs(decision, batch_axes(decision))))
    return program_text(executable, Title(_title(plan), Path(path).name))


def _title(plan: Plan) -> tuple[str, ...]:
    model, cluster = (text.replace("\\", "/").replace('"', "'") for text in (plan.model, plan.cluster))
    return (f"{model} on one rank of mesh {Mesh(plan.mesh)}, as a plan of mode {plan.mode} says.",
            f"{plan.precision}, cluster {cluster} ({plan.cluster_key}), program {plan.program_key}.",
            "Written by autopar; run it with")
