"""What `autopar-solve` does once its arguments are read: build, trace, solve, tell."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import cast

import torch

from autopar.arguments import read_counts, read_layout
from autopar.comparison import compare
from autopar.console.options import Options
from autopar.console.progress import Progress, hushed
from autopar.console.report import as_json, as_text, as_verbose_text, beside
from autopar.core.cluster import Cluster
from autopar.explanation import explain
from autopar.launch import local_cluster
from autopar.models.registry import build
from autopar.passes.capture import BatchNorm, Head, Precision, capture
from autopar.passes.decision import Context
from autopar.passes.lookups import checked
from autopar.passes.notation import op_called
from autopar.plan import Plan
from autopar.plan_cache import solve_or_recall
from autopar.planner import Report, Request, check_shapes, moment_by_moment, prepare, solve, stages_of

MOST_PROCESSES = 8
"""Local processes that are planned for where there is no GPU: more share a machine's memory too thinly."""


def answer(options: Options, progress: Progress, start: float) -> str:
    """The plan as text to print; `start` is when the command started, of `time.perf_counter`. Raises AutoparError."""
    cluster = options.cluster or this_machine()
    pp, mesh, parts = read_counts((options.pp, options.dp, options.tp, options.micro_batches), options.mesh)
    layout = read_layout(options.ppranks, options.dpranks)
    request = Request(options.model, options.mode, mesh, options.optimizer, options.memory_budget, options.solver,
                      options.pins, stages=stages_of(pp, layout, options.mode), micro_batches=parts, layout=layout)
    check_shapes(request, cluster)  # before anything is built
    progress.doing(f"building {options.model}; importing transformers takes seconds, where it is needed")
    built = build(options.model, options.batch, options.seq)
    progress.doing(f"tracing {options.model}")
    with hushed(options.verbose):
        program = capture(built.model, built.call, cast(Precision, options.precision), built.loss_fn)
    program = replace(program, head=cast(Head, options.head), batch_norm=cast(BatchNorm, options.batch_norm))
    progress.doing("working out how each operation can be cut")
    context = checked(prepare(program, cluster))
    if options.explain is not None:
        op_called(context, options.explain)  # refuses an unknown one before anything is solved
    progress.doing(f"solving for {cluster}")
    compared = compare(context, cluster, request, progress.found) if options.json or options.modes else None
    problem = compared.problem if compared else None
    if compared:
        compared = replace(compared, plan=moment_by_moment(compared.plan, context, cluster))
        plan = compared.plan
    elif options.verbose:
        plan, problem = solve(context, cluster, request, progress.found)
        plan = moment_by_moment(plan, context, cluster)
    else:
        plan = solve_or_recall(context, cluster, request, progress.found)
    if options.out is not None:
        plan.save(options.out)
    if options.emit is not None:
        plan.emit(options.emit, context, cluster)
    if options.timeline is not None:
        plan.timeline(options.timeline)
    explained = explain(plan, context, cluster, options.explain) if options.explain is not None else None
    solvers = free_layout(plan, context, cluster, request, progress.found) if layout else None
    if options.json:
        assert compared is not None
        return as_json(compared, time.perf_counter() - start, explained, solvers)
    text = as_verbose_text(plan, problem) if options.verbose and problem else as_text(plan)
    if compared:
        text += f"\n\nstep by mode:\n{compared}"
    if solvers:
        text += f"\n{beside(plan, solvers)}"
    if explained:
        text += f"\n\n{explained}"
    if options.cluster is None:
        text += f"\ncluster: {cluster.name} is what this machine has; --cluster names another"
    return text


def free_layout(plan: Plan, context: Context, cluster: Cluster, request: Request, report: Report) -> Plan:
    """The plan of the same stages, mesh and micro-batches on the layout that the solver finds."""
    asked = replace(request, layout=None, stages=len(plan.pipelining.places), mesh=plan.mesh,
                    micro_batches=plan.micro_batches)
    return solve_or_recall(context, cluster, asked, report)


def this_machine() -> Cluster:
    """The GPUs of this machine, or without any a local process for each core, rounded down to a power of two."""
    cores = min(os.cpu_count() or 1, MOST_PROCESSES)
    return local_cluster(torch.cuda.device_count() or 1 << (cores.bit_length() - 1))
