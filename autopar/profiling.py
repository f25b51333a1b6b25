"""Plans from measured segments: what a plan would run is measured, and the plan made again with that.

A class of segments takes what its measured variant does; ways to run it that were not measured are taken to be off the
roofline as far as that one is. It is measured and solved in turns until the plan runs only what was measured, and of
all plans that were measured so the one of the fewest seconds is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from autopar.codegen.arrivals import input_specs
from autopar.codegen.compiled import COMPILERS, Compiler
from autopar.codegen.executable import Executable, build, offline
from autopar.codegen.footprint import Footprint
from autopar.codegen.lower import Target
from autopar.codegen.reprice import reprice, tally_calls
from autopar.codegen.site import Draws
from autopar.codegen.step_bytes import by_call, eager_footprints, step_bytes
from autopar.core.cluster import Cluster
from autopar.core.observed import Observed
from autopar.measure.segments import measure, surroundings
from autopar.measure.trial import Trial
from autopar.passes.decision import Context, batch_axes
from autopar.passes.problem import Setting
from autopar.plan import Plan
from autopar.planned import Seconds
from autopar.planner import decision_of, setting_of

Costs = Literal["measured", "roofline"]
"""What a plan's seconds of computing are: those of its segments on the devices at hand, or figures of the cluster."""
ROUNDS = 2
"""How often at most a plan is measured and made again."""
LEAST_S = 1e-9
META = torch.device("meta")
log = logging.getLogger("autopar")


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how segments are run to be measured; `folder` is where that is kept, None for nowhere."""

    cluster: Cluster
    device: torch.device
    compiler: Compiler
    draws: Draws
    folder: Path | None


def profiled(plan: Plan, ctx: Context, bench: Bench, again: Callable[[tuple[Observed, ...]], Plan]) -> Plan:
    """The best plan by what its segments were measured to take; `again` makes the best plan given what was observed.

    Collective. Raises AutoparError on all ranks where a segment can't be run.
    """
    known: dict[str, Trial] = {}
    found: list[Plan] = []
    for _ in range(ROUNDS):
        found.append(observed_plan(plan, ctx, bench, known))
        log.info("measured: %.3f ms a step where %.3f were predicted", 1e3 * found[-1].step_time_s,
                 1e3 * plan.step_time_s)
        plan = again(found[-1].observed)
        if plan.stages or any(_same(plan, other) for other in found):
            break
    return min(found, key=lambda each: each.step_time_s)


def observed_plan(plan: Plan, ctx: Context, bench: Bench, known: dict[str, Trial]) -> Plan:
    """The same plan at the price of its measured segments; `known` are trials by variant, and new ones are added."""
    runnable = COMPILERS[bench.compiler](lowered(plan, ctx, bench, bench.device))
    trials = measure(runnable, bench.device, known, surroundings(bench.device, bench.compiler), bench.folder)
    each = [trials[id(call.lowered)] for call in runnable.calls]
    priced = lowered(plan, ctx, bench, META)
    observed = observations(priced, each, setting_of(replace(plan, observed=()), bench.cluster))
    setting = setting_of(replace(plan, observed=observed), bench.cluster)
    seconds, _ = reprice(priced, setting)
    seen = footprints(priced, [found for _, found in each], bench.device.type)
    return replace(plan, observed=observed, observed_peak=step_bytes(priced, seen, setting.optimizer.state_bytes).peak,
                   seconds=Seconds(seconds.seconds, seconds.compute, seconds.inline, seconds.exposed,
                                   seconds.optimizer))


def lowered(plan: Plan, ctx: Context, bench: Bench, device: torch.device) -> Executable:
    """The plan's program on `device` for one rank alone, its inputs coming cut as they are on a rank of its own."""
    decision = decision_of(plan, ctx)
    return build(Target(decision, offline(decision.mesh), bench.cluster.pricer(decision.mesh), device,
                        input_specs(decision, batch_axes(decision)), bench.draws, "outside"))


def footprints(executable: Executable, trials: list[Trial], kind: str) -> tuple[Footprint, ...]:
    """Bytes of each call: as measured, or by autograd's rules on CPUs, where segments run as they are and allocations
    are not told."""
    found = by_call(executable, eager_footprints(executable, kind))
    return found if kind != "cuda" else tuple(
        replace(plain, saved=max(0, round(seen.saved) - sum(plain.results_bytes)), forward=round(seen.forward_bytes),
                backward=round(seen.backward_bytes)) for plain, seen in zip(found, trials, strict=True))


def observations(executable: Executable, trials: list[tuple[str, Trial]], setting: Setting) -> tuple[Observed, ...]:
    """By class, measured seconds over those of the ops alone; of a class that is lowered in several ways, together.

    `trials` are the variant and the trial of each call.
    """
    segmented = executable.decision.context.segmented
    sums: dict[str, list[float]] = {}
    variants: dict[str, str] = {}
    tallies = tally_calls(executable, setting)
    for call, tally, (name, found) in zip(executable.calls, tallies, trials, strict=True):
        first = segmented.class_name(call.segment.class_id)
        figures = (found.forward_s, found.backward_s, tally.forward.compute, tally.backward.compute)
        sums[first] = [a + b for a, b in zip(sums.get(first, [0.0] * 4), figures, strict=True)]
        variants.setdefault(first, name)
    return tuple(Observed(first, variants[first], _over(forward, of_forward), _over(backward, of_backward))
                 for first, (forward, backward, of_forward, of_backward) in sums.items())


def _over(measured: float, predicted: float) -> float:
    return max(measured, LEAST_S) / predicted if predicted > 0 else 1.0


def _same(plan: Plan, other: Plan) -> bool:
    return (plan.mesh, plan.ops, plan.parameters) == (other.mesh, other.ops, other.parameters)
