"""Every mode on one cluster beside the plan that was asked for."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.passes.decision import Context
from autopar.passes.modes import MODES
from autopar.passes.problem import Problem
from autopar.plan import Plan
from autopar.planner import TIE, Report, Request, solve, status_of

Found = tuple[Plan, Problem]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The plan asked for, and seconds a step by mode; None for modes without a plan, and in `reasons` why."""

    plan: Plan
    problem: Problem
    seconds: dict[str, float | None]
    reasons: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.seconds))
        return "\n".join(f"{mode:<{width}}  " + (self.reasons[mode] if seconds is None else f"{1e3 * seconds:.3f} ms")
                         for mode, seconds in self.seconds.items())


def compare(ctx: Context, cluster: Cluster, request: Request, report: Report = lambda _: None) -> Comparison:
    """Solve what is asked for, and where that is auto every other mode too. Raises AutoparError as `solve` does.

    Auto's space holds every mode's, so it never is the slower: on the mesh of a faster one, which may have more axes
    than auto searches, it is solved again, and where the time allowed ends before that is as good, it takes its plan.
    """
    plan, problem = solve(ctx, cluster, request, report)
    if request.mode != "auto":
        others = {mode: f"not solved, as mode {request.mode} was asked for" for mode in MODES if mode != request.mode}
        return Comparison(plan, problem, {mode: None if mode in others else plan.step_time_s for mode in MODES}, others)
    rivals, reasons = _rivals(ctx, cluster, request, report)
    for rival in sorted(rivals.values(), key=lambda found: found[0].step_time_s)[:1]:
        plan, problem = _faster((plan, problem), rival, ctx, cluster, request, report)
    found = {"auto": plan, **{mode: rival for mode, (rival, _) in rivals.items()}}
    return Comparison(plan, problem, {mode: found[mode].step_time_s if mode in found else None for mode in MODES},
                      reasons)


def _rivals(ctx: Context, cluster: Cluster, request: Request,
            report: Report) -> tuple[dict[str, Found], dict[str, str]]:
    """The plans of all modes but auto, and why others have none."""
    plans: dict[str, Found] = {}
    reasons: dict[str, str] = {}
    for mode in MODES:
        if mode == "auto":
            continue
        report(f"mode {mode}, to compare:")
        try:
            plans[mode] = solve(ctx, cluster, replace(request, mode=mode), report)
        except AutoparError as refusal:
            reasons[mode] = str(refusal)
    return plans, reasons


def _faster(auto: Found, rival: Found, ctx: Context, cluster: Cluster, request: Request, report: Report) -> Found:
    """Auto's plan, or a better one where the fastest mode's is faster: auto's on that mesh, else that mode's."""
    plan, mesh = rival[0], rival[0].mesh
    if auto[0].step_time_s <= plan.step_time_s * (1.0 + TIE):
        return auto
    if auto[0].mesh != mesh:
        report(f"mode {plan.mode} is faster on mesh {'x'.join(map(str, mesh))}; auto there:")
        with contextlib.suppress(AutoparError):  # out of time
            auto = solve(ctx, cluster, replace(request, mesh=mesh), report)
    if auto[0].step_time_s <= plan.step_time_s * (1.0 + TIE):
        return auto
    bound = (1.0 - auto[0].gap) * auto[0].step_time_s if auto[0].mesh == mesh else 0.0
    gap = max(0.0, 1.0 - bound / plan.step_time_s)
    return replace(plan, mode="auto", gap=gap, status=status_of(gap)), rival[1]
