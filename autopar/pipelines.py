"""Plans with stages: for each number of stages, micro-batches and mesh a decision, and the best stages for it."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import torch

from autopar.codegen.entries import CHUNKS, Assembly, Costed, Menus, assembly_of, menus_of
from autopar.codegen.executable import Executable, offline
from autopar.codegen.executable import build as lower_all
from autopar.codegen.lower import Target
from autopar.codegen.reprice import Phase
from autopar.codegen.stages import check_bonds
from autopar.codegen.traffic import traffic
from autopar.core.assembly import Assembled, Instance, Priced, Taken, price
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError, Infeasible
from autopar.core.mesh import Mesh
from autopar.core.schedules import Pipe, Schedule, Timing, played
from autopar.passes.choices import op_choices
from autopar.passes.decision import Context, Decision, context
from autopar.passes.micro import Micro, micro
from autopar.passes.modes import mode_called
from autopar.passes.outline import outline
from autopar.passes.problem import Problem, Setting, build, check_batch
from autopar.passes.segments import annotate
from autopar.passes.staged import as_staged, without_results
from autopar.planned import Bytes, Pipelining, PlannedSegment, PlannedStage, Seconds
from autopar.solver import mapping
from autopar.solver.assembly import AGREEMENT, assemble
from autopar.solver.grid import Send
from autopar.solver.optimise import Begun, begin, finish

WORTH = 1e-3
"""The part of a step below which another layout is not worth solving for."""
MOST_INTERLEAVED = 4
"""Places of a pipeline, beyond which cutting it finer is not looked at: it would take too long."""
LIMITS_S: dict[Schedule, float] = {"interleaved": 2.0}
"""Seconds for the stages of a schedule, where they are limited: with what is found by then, or without it."""
MOST_LOOPED = 16
"""Stages beyond which a last one with the first is not looked for: the model of it takes long."""
MOST_FLIGHTS = 8
"""Micro-batches for each stage, beyond which the pipeline's filling and draining are small already."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Stages, micro-batches, and the mesh of a stage."""

    stages: int
    micro_batches: int
    mesh: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.stages} stages x {Mesh(self.mesh)}, {self.micro_batches} micro-batches"


@dataclass(eq=False)
class MicroContexts:
    """The annotated programs of a batch's micro-batches, by their number, each made once."""

    whole: Context
    made: dict[int, tuple[Context, Micro]] = field(default_factory=dict)

    def of(self, parts: int) -> tuple[Context, Micro]:
        """The program of one of `parts`. Raises AutoparError where the batch can't be cut so."""
        if parts not in self.made:
            cut = micro(self.whole, parts)
            self.made[parts] = (self.whole if parts == 1 else context(annotate(cut.program))), cut
        return self.made[parts]


@dataclass(frozen=True, eq=False)
class Found:
    """A decision for a shape, its stages and their price."""

    shape: Shape
    problem: Problem
    decision: Decision
    assembly: Assembly
    assembled: Assembled
    executable: Executable
    bound: float
    schedule: Schedule

    @cached_property
    def seconds(self) -> float:
        """Seconds a step."""
        return step_seconds(self.assembly, self.assembled.taken, self.schedule)


NOT_YET = Assembled((), Priced(math.inf, 0.0, 0.0, 0.0, (), (), (), ()), 0.0)
"""The stages of what is still to be assembled."""


def staged_setting(setting: Setting, shape: Shape, layout: tuple[int, ...]) -> Setting:
    """`setting` for the stages of a shape on `layout`."""
    return replace(setting, mesh=Mesh(shape.mesh), stages=shape.stages, micro_batches=shape.micro_batches,
                   layout=layout)


def by_host(cluster: Cluster) -> tuple[int, ...]:
    """All devices, those of a host together."""
    return tuple(sorted(range(cluster.size), key=lambda d: (cluster.hosts[d], d)))


def lowered(decision: Decision, setting: Setting) -> Executable:
    """The program of a decision, lowered for the first device of a stage without connecting to others."""
    return lower_all(Target(decision, offline(Mesh(setting.mesh.shape)), setting.price, torch.device("meta")))


def deciding(setting: Setting) -> Setting:
    """The setting, in which on one device there is nothing to decide."""
    alone = setting.stages > 1 and setting.mesh.size == 1
    return replace(setting, mode=mode_called("pp")) if alone else setting


def begun(contexts: MicroContexts, setting: Setting, solver: str, limit_s: float) -> tuple[Problem, tuple[Begun, ...]]:
    """The sharding problem of a shape, bounded; where the budget counts, without what results take of it too, as they
    may be made again. The last has the least bound. Raises AutoparError where it has no solution."""
    ctx, _ = contexts.of(setting.micro_batches)
    setting = deciding(setting)
    check_batch(ctx, setting)
    problem = build(ctx, setting)
    staged, found, refusal = as_staged(problem), list[Begun](), None
    try:
        found.append(begin(staged, solver=solver, limit_s=limit_s))
    except Infeasible as error:
        refusal = error
    if trains(ctx) and (refusal or found[0].bound.prices.byte.any()):
        found.append(begin(without_results(staged), solver=solver, limit_s=limit_s))
    if refusal and not found:
        raise refusal
    return problem, tuple(found)


def trains(ctx: Context) -> bool:
    """Whether there is a backward, for which results may be made again."""
    return ctx.segmented.factored.program.training


def assembled(problem: Problem, every: tuple[Begun, ...], solver: str, limit_s: float) -> Found:
    """The best stages of the best decisions of a shape. Raises Infeasible."""
    ways: list[Found] = []
    refusals: list[AutoparError] = []
    solutions = [finish(each, math.inf, solver, limit_s) for each in every]
    for choices in dict.fromkeys(solution.choices for solution in solutions if solution):
        decision = problem.decide(choices)
        plain = lowered(decision, problem.setting)
        first = assembly_of(plain, problem.setting, "1f1b")
        for way in (_plainly, _recomputing):
            try:
                ways += way(Found(_shape(problem.setting), problem, decision, first, NOT_YET, plain,
                                  every[-1].bound.seconds, "1f1b"), solver, limit_s)
            except AutoparError as refusal:
                refusals.append(refusal)
    if not ways:
        raise refusals[0]
    return min(ways, key=lambda way: way.seconds)


def _plainly(first: Found, solver: str, limit_s: float) -> list[Found]:
    """The best stages by each schedule where results are kept. Raises AutoparError where none has any."""
    setting, ways, refusals = first.problem.setting, list[Found](), list[AutoparError]()
    for schedule in _schedules(first):
        assembly = first.assembly if schedule == "1f1b" else assembly_of(first.executable, setting, schedule)
        try:
            best = assemble(assembly.instance, solver, min(limit_s, LIMITS_S.get(schedule, math.inf)))
            ways.append(replace(first, assembly=assembly, assembled=best, schedule=schedule))
        except AutoparError as refusal:
            refusals.append(refusal)
    if not ways:
        raise refusals[0]
    return ways


def _recomputing(first: Found, solver: str, limit_s: float) -> list[Found]:
    """The best stages by 1F1B of which some keep less than all, none where all fits. Raises AutoparError."""
    setting, decision, plain = first.problem.setting, first.decision, first.assembly.instance
    if not trains(decision.context) or _fits(plain, _roomy(plain, solver)):
        return []
    names = [segment.name for segment in decision.context.segmented.segments]
    marked = lowered(replace(decision, kept=dict.fromkeys(names, ())), setting)
    menus = menus_of(marked, setting, solver)
    joint = assembly_of(marked, setting, "1f1b", menus)
    best = assemble(joint.instance, solver, limit_s)
    kept = _kept(best.taken, menus, [call.segment.name for call in marked.calls])
    executable = replace(marked, target=replace(marked.target, decision=replace(decision, kept=kept)))
    assembly = assembly_of(executable, setting, "1f1b")
    taken = taken_of(assembly, [sum(map(sum, stage)) for stage in best.taken])
    priced = price(assembly.instance, taken)
    assert math.isclose(priced.seconds, best.priced.seconds, rel_tol=AGREEMENT), \
        f"stages of menus take {best.priced.seconds} s, decided {priced.seconds} s"
    return [replace(first, decision=executable.decision, assembly=assembly, executable=executable,
                    assembled=Assembled(taken, priced, best.bound))]


def _roomy(instance: Instance, solver: str) -> Priced:
    """The best stages without any budget."""
    free = replace(instance, places=tuple(replace(place, budget=math.inf) for place in instance.places))
    return assemble(free, solver).priced


def _fits(instance: Instance, priced: Priced) -> bool:
    return all(nbytes <= place.budget for nbytes, place in zip(priced.held, instance.places, strict=True))


def _kept(taken: Taken, menus: Menus, names: list[str]) -> dict[str, tuple[str, ...]]:
    """What each segment keeps, those of a run in a stage that keep less first."""
    found, at = dict[str, tuple[str, ...]](), 0
    for run in (run for stage in taken for run in stage):
        entries = [e for e, n in enumerate(run) for _ in range(n)]
        entries.sort(key=lambda e: menus[at][e].nbytes)
        for e in entries:
            found[names[at]] = menus[at][e].names
            at += 1
    return found


def _shape(setting: Setting) -> Shape:
    return Shape(setting.stages, setting.micro_batches, setting.mesh.shape)


def _schedules(first: Found) -> list[Schedule]:
    """Those that may be the best: a last stage with the first pays where they share parameters, several stages a
    device where the wait for the first micro-batch is long beside what each sends."""
    setting, found = first.problem.setting, list[Schedule](["1f1b"])
    if first.assembly.instance.ties and setting.micro_batches > 1 and setting.stages <= MOST_LOOPED:
        found.append("looped")
    if (_may_interleave(setting.stages, setting.micro_batches)
            and len(first.executable.calls) >= CHUNKS * setting.stages):
        found.append("interleaved")
    return found


def pipelining_of(found: Found) -> Pipelining:
    """The stages as a plan tells of them."""
    names = [call.segment.name for call in found.executable.calls]
    return Pipelining(tuple(_stages(found.assembly, found.assembled.taken, found.assembled.priced, names,
                                    found.problem.setting)), found.shape.micro_batches, found.schedule)


def segments_of(found: Found) -> tuple[PlannedSegment, ...]:
    """The segments of all stages, by a device of the setting."""
    def parts(phase: Phase, seconds: float) -> tuple[float, float, float]:
        return phase.compute + phase.talk, phase.inline, seconds - phase.compute - phase.talk - phase.inline

    return tuple(PlannedSegment(call.segment.name, *parts(each.tally.forward, each.entry.forward),
                                *parts(each.tally.backward, each.entry.backward), each.entry.saved, 0.0)
                 for call, each in zip(found.executable.calls, found.assembly.calls, strict=True))


def _stages(assembly: Assembly, taken: Taken, priced: Priced, names: list[str],
            setting: Setting) -> Iterator[PlannedStage]:
    size, start = setting.mesh.size, 0
    for j, (stage, place) in enumerate(zip(taken, assembly.instance.places, strict=True)):
        count = sum(map(sum, stage))
        entries = [call.entry for call in assembly.calls[start:start + count]]
        at = j % assembly.instance.devices * size
        yield PlannedStage(names[start], names[start + count - 1], count, setting.layout[at:at + size],
                           place.slow * sum(e.forward for e in entries), place.slow * sum(e.backward for e in entries),
                           priced.crossing[j] if j < len(priced.crossing) else 0.0, priced.nbytes[j], place.flight)
        start += count


def taken_of(assembly: Assembly, counts: list[int]) -> Taken:
    """The stages that have so many segments each, by run."""
    found, left = [], [run.count for run in assembly.instance.runs]
    for count in counts:
        stage = []
        for r, have in enumerate(left):
            here = min(have, count)
            stage.append((here,))
            left[r], count = have - here, count - here
        found.append(tuple(stage))
    return tuple(found)


def _calls_on(assembly: Assembly, taken: Taken, device: int) -> tuple[tuple[Costed, int], ...]:
    """The calls on one device, each with the micro-batches that its stage keeps."""
    bounds = list(itertools.accumulate((sum(map(sum, stage)) for stage in taken), initial=0))
    return tuple((call, assembly.instance.places[j].flight) for j in assembly.instance.on(device)
                 for call in assembly.calls[bounds[j]:bounds[j + 1]])


def timing_of(assembly: Assembly, taken: Taken) -> Timing:
    """Seconds of each stage and cut."""
    instance, priced = assembly.instance, price(assembly.instance, taken)
    bounds = list(itertools.accumulate((sum(map(sum, stage)) for stage in taken), initial=0))
    parts = [assembly.calls[a:b] for a, b in itertools.pairwise(bounds)]
    return Timing(tuple(place.slow * sum(c.entry.forward for c in part)
                        for place, part in zip(instance.places, parts, strict=True)),
                  tuple(place.slow * sum(c.entry.backward for c in part)
                        for place, part in zip(instance.places, parts, strict=True)), priced.crossing)


def step_seconds(assembly: Assembly, taken: Taken, schedule: Schedule) -> float:
    """Seconds of a step as its schedule plays, and of what is done once at its end."""
    instance = assembly.instance
    pipe = Pipe(len(taken), instance.devices, instance.micro_batches)
    end = max(span.end_s for span in played(schedule, pipe, timing_of(assembly, taken)))
    return end + price(instance, taken).finish


def seconds_of(assembly: Assembly, taken: Taken, schedule: Schedule) -> Seconds:
    """The parts of a step: those of the slowest device, and what it waits for the others."""
    instance, priced = assembly.instance, price(assembly.instance, taken)
    busy = [sum(priced.stages[j] for j in instance.on(device)) for device in range(instance.devices)]
    slowest = max(range(instance.devices), key=busy.__getitem__)
    on = [[call for call, _ in _calls_on(assembly, taken, device)] for device in range(instance.devices)]
    slow, micro_batches, total = instance.places[slowest].slow, instance.micro_batches, step_seconds(assembly, taken,
                                                                                                      schedule)
    compute = micro_batches * slow * sum(c.tally.forward.sums.work + c.tally.backward.sums.work + c.again
                                          for c in on[slowest])
    inline = micro_batches * slow * sum(c.tally.forward.inline + c.tally.backward.inline for c in on[slowest])
    last = max(range(instance.devices), key=lambda device: sum(c.entry.step for c in on[device]))
    optimizer = sum(c.optimizer for c in on[last])
    exposed = max(0.0, micro_batches * busy[slowest] - compute - inline) + priced.finish - optimizer
    return Seconds(total, compute, inline, exposed, optimizer, total - compute - inline - exposed - optimizer)


def bytes_of(assembly: Assembly, taken: Taken) -> Bytes:
    """The bytes of the fullest device by kind."""
    priced = price(assembly.instance, taken)
    fullest = max(range(assembly.instance.devices), key=priced.held.__getitem__)
    calls = _calls_on(assembly, taken, fullest)
    parameters, gradients, optimizer = (sum(getattr(call.memory, name) for call, _ in calls)
                                        for name in ("parameters", "gradients", "optimizer"))
    kept = sum(call.memory.activations + flight * call.entry.saved for call, flight in calls)
    rest = priced.held[fullest] - parameters - gradients - optimizer - kept
    return Bytes(parameters, gradients, optimizer, kept, rest)


def shapes_to_try(cluster: Cluster, batch: int, segments: int, meshes: dict[int, tuple[tuple[int, ...], ...]],
                  pinned: int | None) -> list[Shape]:
    """Stages, micro-batches and meshes, of which `meshes` has those of a stage of so many devices."""
    found = []
    for size, shapes in meshes.items():
        stages = cluster.size // size
        if stages > segments:
            continue
        powers = {2 ** i for i in range(20)}
        parts = [pinned] if pinned else [m for m in sorted(powers | {batch // n for n in powers if batch % n == 0})
                                         if batch % m == 0 and (m == 1 or stages / 2 <= m <= MOST_FLIGHTS * stages)]
        found += [Shape(stages, m, shape) for shape in shapes for m in parts]
    return found


@dataclass(frozen=True, slots=True)
class Asked:
    """How pipelines are searched: the setting of one, the solver and its seconds, who is told, and the layout if it is
    given."""

    setting: Setting
    solver: str
    limit_s: float
    report: Callable[[str], None]
    layout: tuple[int, ...] = ()


def least_share(shape: Shape) -> float:
    """What of a step by 1F1B the same takes at least by the best schedule: interleaving waits less."""
    if not _may_interleave(shape.stages, shape.micro_batches):
        return 1.0
    waits = shape.stages - 1
    return (shape.micro_batches + waits / CHUNKS) / (shape.micro_batches + waits)


def _may_interleave(stages: int, micro_batches: int) -> bool:
    return 1 < stages <= MOST_INTERLEAVED and micro_batches % stages == 0


def least_work(ctx: Context, setting: Setting) -> float:
    """Seconds that one device would compute for, without what it takes to launch kernels: a share of these is what
    each of several computes for at least, however ops and batch are cut."""
    device, mesh, found = replace(setting.device, launch_s=1e-12), Mesh((1,)), 0.0
    for op, count in outline(ctx).ops.values():
        choice, = op_choices(ctx, op, [("R",)], mesh, device)
        found += count * (choice.forward + choice.backward)
    return found


@dataclass(frozen=True, eq=False)
class Look:
    """A shape's problem, bounded, and the seconds of its stages were there room for all."""

    shape: Shape
    problem: Problem
    every: tuple[Begun, ...]
    roomy_s: float

    @property
    def bound(self) -> float:
        """Seconds that the shape takes at least."""
        return self.every[-1].bound.seconds * least_share(self.shape)


@dataclass(eq=False)
class _Search:
    """Shapes and what was found of them; `least` is a bound of all."""

    contexts: MicroContexts
    asked: Asked
    layout: tuple[int, ...]
    bounds: dict[Shape, float]
    beat: float
    best: Found | None = None
    least: float = math.inf
    refusals: list[AutoparError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.end = time.perf_counter() + self.asked.limit_s

    @property
    def most(self) -> float:
        """Seconds that a shape has to take less than."""
        return min(self.beat, self.best.seconds if self.best else math.inf)

    @property
    def over(self) -> bool:
        """Whether what there is has to do."""
        return self.best is not None and time.perf_counter() > self.end

    def run(self, parts: int) -> None:
        """All shapes of so many micro-batches, those first that may be the best."""
        looks = [look for shape, bound in self.bounds.items() if shape.micro_batches == parts
                 for look in self._looked(shape, bound)]
        for look in sorted(looks, key=lambda look: look.roomy_s):
            self.least = min(self.least, look.bound)
            if look.bound >= self.most:
                self.asked.report(f"{look.shape}: at least {1e3 * look.bound:.3f} ms a step")
            elif not self.over:
                self._take(look)

    def _looked(self, shape: Shape, bound: float) -> list[Look]:
        """The shape's problem, unless it is known to be no better, or to have no solution."""
        if bound >= self.most or self.over:
            self.least = min(self.least, bound)
            return []
        try:
            setting = staged_setting(self.asked.setting, shape, self.layout)
            problem, every = begun(self.contexts, setting, self.asked.solver, self.asked.limit_s)
            return [Look(shape, problem, every, _roomy_seconds(problem, every[-1], self.asked))]
        except AutoparError as refusal:
            self.refusals.append(refusal)
            return []

    def _take(self, look: Look) -> None:
        try:
            found = assembled(look.problem, look.every, self.asked.solver, self.asked.limit_s)
        except AutoparError as refusal:
            self.refusals.append(refusal)
            return
        self.asked.report(f"{look.shape}: {1e3 * found.seconds:.3f} ms a step")
        self.best = found if found.seconds < self.most else self.best


def _roomy_seconds(problem: Problem, begun: Begun, asked: Asked) -> float:
    """Seconds of the stages of a shape's best decision with room for all of it."""
    solution = finish(begun, math.inf, asked.solver, asked.limit_s)
    assert solution is not None
    instance = assembly_of(lowered(problem.decide(solution.choices), problem.setting), problem.setting, "1f1b").instance
    return _roomy(instance, asked.solver).seconds


def search(contexts: MicroContexts, cluster: Cluster, shapes: list[Shape], asked: Asked,
           beat: float) -> tuple[Found | None, float, list[AutoparError]]:
    """The best of the shapes that takes fewer seconds than `beat`, a lower bound of all, and refusals.

    Shapes are looked at by their micro-batches, the most first, on devices host by host; what can't beat the best so
    far is passed over. The best is placed anew on the devices in the end, unless a layout is given.
    """
    work = least_work(contexts.whole, asked.setting) / cluster.size
    bounds = {shape: work * (1.0 + (shape.stages - 1) / shape.micro_batches) * least_share(shape) for shape in shapes}
    found = _Search(contexts, asked, asked.layout or by_host(cluster), bounds, beat)
    for parts in sorted({shape.micro_batches for shape in shapes}, reverse=True):
        found.run(parts)
    best = _restricted(found.best, contexts, asked) if found.best else None
    return (best if best is None or asked.layout else remapped(best, contexts, asked), found.least, found.refusals)


def _restricted(found: Found, contexts: MicroContexts, asked: Asked) -> Found:
    """The best of a decision and those of narrower modes for the same shape: the problem that is solved takes stages to
    be alike, so that a narrower mode's decision may turn out the faster one."""
    best, setting = found, found.problem.setting
    for name in ("pp", "pp+zero") if asked.setting.mode.name == "auto" and setting.mesh.size > 1 else ():
        with contextlib.suppress(AutoparError):
            narrow = replace(setting, mode=mode_called(name))
            other = assembled(*begun(contexts, narrow, asked.solver, asked.limit_s), asked.solver, asked.limit_s)
            best = min(best, other, key=lambda each: each.seconds)
    return best


MAPPING_LIMIT_S = 3.0
"""Seconds for the layout of the best plan with stages; beyond `MANY` devices, a third of it."""
MANY = 64


def traffic_of(found: Found) -> mapping.Instance:
    """What a plan sends, for its layout: activations over each cut forth and back, in each period what shows of the
    slowest; what the busiest stage sends inside; and gradients of what the first and the last stage share."""
    setting, instance = found.problem.setting, found.assembly.instance
    nbytes = max((run.inside for run in instance.runs), default=0.0) or max(run.after for run in instance.runs)
    bounds = list(itertools.accumulate((sum(map(sum, stage)) for stage in found.assembled.taken), initial=0))
    inside = [traffic(found.executable, [(i, found.assembly.calls[i].memory) for i in range(a, b)],
                      instance.micro_batches) for a, b in itertools.pairwise(bounds)]
    busiest = max(inside, key=lambda sent: sum(setting.price(primitive, axes, each) * times
                                               for primitive, axes, each, times in sent))
    sums = tuple(mapping.Collective(primitive, tuple(axis + 1 for axis in axes), each, times)
                 for primitive, axes, each, times in busiest if setting.mesh.extent(axes) > 1)
    return mapping.Instance(setting.cluster, (setting.stages, *setting.mesh.shape),
                            Send(nbytes, 2.0, instance.micro_batches - 1.0), sums, _around(found, nbytes))


def _around(found: Found, nbytes: float) -> Send:
    """What goes between the first place and the last: to a stage that is on the first one's devices, or gradients."""
    instance, ties = found.assembly.instance, found.assembly.instance.ties
    if found.schedule == "looped":
        return Send(nbytes, 2.0)
    return Send(max((tie.nbytes for tie in ties), default=0.0), float(len(ties) > 0 and instance.devices > 1))


def remapped(found: Found, contexts: MicroContexts, asked: Asked) -> Found:
    """The same shape on the devices that its traffic fits best, where that is better."""
    instance, setting = traffic_of(found), found.problem.setting
    placed = mapping.place(instance, MAPPING_LIMIT_S if instance.size <= MANY else MAPPING_LIMIT_S / 3)
    if mapping.price(instance, setting.layout) - placed.seconds < WORTH * found.seconds:
        return found
    with contextlib.suppress(AutoparError):
        elsewhere = staged_setting(asked.setting, found.shape, placed.devices)
        again = assembled(*begun(contexts, elsewhere, asked.solver, asked.limit_s), asked.solver, asked.limit_s)
        asked.report(f"{found.shape} on devices {', '.join(map(str, placed.devices))}: {1e3 * again.seconds:.3f} ms")
        return min(again, found, key=lambda each: each.seconds)
    return found


def recomputed(pipelining: Pipelining, decision: Decision, setting: Setting) -> tuple[float, float]:
    """(seconds, bytes) of stages from their lowered program. Raises AutoparError where they are not of its segments."""
    schedule = cast(Schedule, pipelining.schedule)
    executable = lowered(decision, setting)
    assembly = assembly_of(executable, setting, schedule)
    counts = [stage.segments for stage in pipelining.stages]
    if sum(counts) != len(assembly.calls):
        raise AutoparError(f"the plan's stages have {sum(counts)} segments, the program has {len(assembly.calls)}; the "
                           "plan was edited or made by another version: plan again")
    check_bonds(executable, list(itertools.accumulate(counts, initial=0)))
    taken = taken_of(assembly, counts)
    return step_seconds(assembly, taken, schedule), max(price(assembly.instance, taken).held)
