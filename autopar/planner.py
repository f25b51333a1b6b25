"""From a captured program to a plan, and from a plan back to a decision on a program."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from autopar import pipelines
from autopar.arguments import ClusterLike, read_cluster
from autopar.budget import Lowerings, best_within, lowered, recomputing
from autopar.codegen.executable import Executable
from autopar.codegen.reprice import Item, Memory, itemised, reprice, saved_by, tally_calls
from autopar.codegen.surrounding import surrounding_bytes
from autopar.codegen.ways import bytes_by_call, memory_of, ways_of
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError, Infeasible
from autopar.core.mesh import Mesh
from autopar.core.observed import Observed, factors_of
from autopar.core.ranks import HandLayout
from autopar.core.sharding import Instance, Priced, Solution, Sums
from autopar.core.told import told
from autopar.passes.capture import KEPT, BatchNorm, Program, Stored
from autopar.passes.constants import FoldConstants
from autopar.passes.costs import Optimizer, optimizer_called, slowest
from autopar.passes.decision import Context, Decision, context
from autopar.passes.functional import is_update
from autopar.passes.heads import ChunkHeads, heads_of, worth
from autopar.passes.modes import Mode, mode_called
from autopar.passes.normalize import Normalize
from autopar.passes.notation import op_text, parameter_text
from autopar.passes.pins import PinRefused, Pins, allowed
from autopar.passes.problem import Problem, Setting, batch_of, build, check_batch
from autopar.passes.segments import annotate
from autopar.passes.strategies import Assignment, Storage, assignments, parse_storage, storages
from autopar.plan import Plan
from autopar.planned import Bytes, PlannedCheckpoint, PlannedOp, PlannedParameter, PlannedSegment, Seconds
from autopar.refusals import merged
from autopar.remedies import Asked, remedies
from autopar.solver.optimise import Begun, begin, finish, optimise
from autopar.workload import peak_flops_per_s, workload_of

RESERVE = 0.08
"""The share of a device's memory that is left to the context, communication buffers and fragmentation."""
AGREEMENT = 1e-6
TIE = 1e-9
"""The relative difference in seconds below which two meshes are as fast as each other."""
SIMPLER = ("pp+zero",)
"""Modes with stages that `auto` looks at first: they are small, and where time runs out their plans are good ones."""
SOLVE_LIMIT_S = 30.0
"""Seconds for one mesh shape; what is found by then is taken, with its proven gap."""
STAGES_LIMIT_S = 12.0
"""Seconds after which, where there is a plan with stages, no more of them are looked for."""
UNLIMITED = 2.0**100
"""Bytes that nothing exceeds."""
CLEAR = 0.5
"""The part of a device's own budget up to which the rough sums of what ops make are enough to know that a plan fits."""
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. `mesh` None searches shapes; `memory_budget` in bytes, None: the device less a reserve.

    `pins` fix ops to strategies, as texts of a plan; `observed` is what was measured of segments. `stages` and
    `micro_batches` None are searched by modes that take stages; `mesh` is then that of a stage. `layout` is by hand,
    None to find one.
    """

    model: str
    mode: str = "auto"
    mesh: tuple[int, ...] | None = None
    optimizer: str = "adamw"
    memory_budget: float | None = None
    solver: str = "cbc"
    pins: Pins = ()
    observed: tuple[Observed, ...] = ()
    stages: int | None = None
    micro_batches: int | None = None
    layout: HandLayout | None = None

    def setting(self, cluster: Cluster, shape: tuple[int, ...], pinned: dict[str, Storage] | None = None,
                stages: int = 1) -> Setting:
        """The setting on one mesh shape. Raises AutoparError for unknown words or a mesh of another size."""
        if Mesh(shape).size * stages != cluster.size:
            each = "" if stages == 1 else f" in each of {stages} stages"
            raise AutoparError(f"mesh {Mesh(shape)} has {Mesh(shape).size} devices{each}, cluster {cluster.name} has "
                               f"{cluster.size}; choose a mesh whose sizes multiply to {cluster.size / stages:g}")
        budget = self.memory_budget
        if budget is None:
            budget = (1 - RESERVE) * min(device.memory_bytes for device in cluster.devices)
        return Setting(Mesh(shape), cluster, mode_called(self.mode), self.resolved_optimizer, budget, pinned or {},
                       factors=factors_of(self.observed))

    @property
    def resolved_optimizer(self) -> Optimizer:
        """The optimizer's figures."""
        return optimizer_called(self.optimizer)


def prepare(program: Program, cluster: Cluster | None = None) -> Context:
    """Run every pass up to the sharding problem; what depends on where a program runs is as on `cluster`."""
    folded = _folded(program)
    if cluster is not None and worth(folded, slowest(cluster.devices), cluster.size):
        folded = ChunkHeads()(folded)
    return context(annotate(folded))


def _folded(program: Program) -> Program:
    return FoldConstants()(Normalize()(KEPT[program.returns](program)))


def shapes_for(request: Request, cluster: Cluster) -> tuple[tuple[int, ...], ...]:
    """The mesh shapes to try, the most even first."""
    if request.mesh is not None:
        return (request.mesh,)
    return tuple(sorted(mode_called(request.mode).shapes_for(cluster.size), key=max))


def check_shapes(request: Request, cluster: Cluster) -> None:
    """Raises AutoparError where what is asked for doesn't fit together, whatever the program."""
    check_stages(request)
    if request.layout:
        request.layout.devices(cluster.size)
    if with_stages(request):
        stage_meshes(request, cluster)
        return
    for shape in shapes_for(request, cluster):
        request.setting(cluster, shape).mode.on(shape)


def check_stages(request: Request) -> None:
    """Raises AutoparError for what goes with stages alone, or not with them."""
    if request.micro_batches is not None and not with_stages(request):
        raise AutoparError(f"micro_batches is {request.micro_batches}, and mode {request.mode} without pp= has no "
                           "stages to run them; give pp=, or a mode with stages such as pp")
    if request.layout and (request.stages or 1) != request.layout.stages:
        raise AutoparError(f"ppranks have {request.layout.stages} ranks each, the plan has {request.stages or 1} "
                           f"stages; use as many, pp={request.layout.stages}")
    if request.layout and request.layout.stages == 1:
        raise AutoparError("ppranks have 1 rank each, and without stages there is nothing to lay out; leave them out, "
                           "or name the ranks of a pipeline in each list")
    if request.pins and with_stages(request):
        raise AutoparError(f"pins fix {', '.join(name for name, _ in request.pins)}, and ops of plans with stages "
                           "can't be fixed yet; leave pins out, or use a mode without stages")


def stages_of(pp: int | None, layout: HandLayout | None, mode: str) -> int | None:
    """The stages that are asked for; a mode with stages takes as many as a layout has. Raises AutoparError for a layout
    without either."""
    if pp is not None or layout is None:
        return pp
    if layout.stages > 1 and not mode_called(mode).staged:
        raise AutoparError(f"ppranks lay out {layout.stages} stages, and mode {mode} is asked for without pp=; give "
                           f"pp={layout.stages} too, or leave ppranks and dpranks out")
    return layout.stages


def solve(ctx: Context, cluster: Cluster, request: Request, report: Report = lambda _: None) -> tuple[Plan, Problem]:
    """The best plan over mesh shapes, with the problem it solves.

    Raises Infeasible when no shape has one, AutoparError when that is for the pins alone.
    """
    check_stages(request)
    if with_stages(request):
        found = _staged(ctx, cluster, request, report, math.inf)
        assert found is not None
        return found
    if not may_have_stages(request, cluster):
        return _of_one_stage(ctx, cluster, request, report)
    alone: tuple[Plan, Problem] | None = None
    refusal: AutoparError | None = None
    try:
        alone = _of_one_stage(ctx, cluster, request, report)
    except AutoparError as error:  # stages may fit where the whole does not
        refusal = error
    found = None
    with contextlib.suppress(AutoparError):  # a pipeline is one more way, not a must
        found = _staged(ctx, cluster, request, report, alone[0].step_time_s if alone else math.inf)
    best = found or alone
    if best is None:
        assert refusal is not None
        raise refusal
    return best


def with_stages(request: Request) -> bool:
    """Whether only plans with stages are asked for."""
    return mode_called(request.mode).staged or (request.stages or 1) > 1


def may_have_stages(request: Request, cluster: Cluster) -> bool:
    """Whether a plan with stages would do besides one without."""
    return (request.mode == "auto" and request.stages is None and request.mesh is None and not request.pins
            and cluster.size > 1)


def stage_meshes(request: Request, cluster: Cluster) -> dict[int, tuple[tuple[int, ...], ...]]:
    """By devices of a stage, the meshes to try. Raises AutoparError when there are none."""
    mode, size = mode_called(request.mode), cluster.size
    if request.stages is not None and size % request.stages:
        raise AutoparError(f"{request.stages} stages do not divide the {size} devices of {cluster.name}; use one of "
                           f"{', '.join(str(n) for n in range(1, size + 1) if size % n == 0)}")
    counts = [request.stages] if request.stages else [n for n in range(2, size + 1) if size % n == 0]
    found = {}
    for n in (size // stages for stages in counts):
        shapes = (request.mesh,) if request.mesh else mode.shapes(n)
        found[n] = tuple(shape for shape in shapes if Mesh(shape).size == n)
    found = {n: shapes for n, shapes in found.items() if shapes}
    if not found and request.mesh:
        raise AutoparError(f"mesh {Mesh(request.mesh)} of a stage has {Mesh(request.mesh).size} devices, the stages of "
                           f"{cluster.name} have {' or '.join(str(size // n) for n in counts)}; use another mesh, or "
                           "another number of stages")
    if not found:
        raise AutoparError(f"mode {request.mode} wants {mode.wants} in each of its stages, {cluster.name} has {size} "
                           f"devices for {request.stages or 'any number of'} stages; use other stages or another mode")
    for shapes in found.values():
        for shape in shapes:
            mode.on(shape)
    return found


def _staged(ctx: Context, cluster: Cluster, request: Request, report: Report,
            beat: float) -> tuple[Plan, Problem] | None:
    """The best plan with stages of fewer seconds than `beat`, None without one. Raises AutoparError."""
    start = time.perf_counter()
    shapes = _shapes(ctx, cluster, request)
    if not shapes and math.isinf(beat):
        raise AutoparError(f"no number of stages and micro-batches fits the batch of {batch_of(ctx)} and the "
                           f"{len(ctx.segmented.segments)} segments of {request.model} on {cluster.name}; use "
                           f"{_stages_for(ctx, cluster)} stages and micro-batches that divide the batch")
    contexts, found = pipelines.MicroContexts(ctx), None
    for mode in dict.fromkeys((*(SIMPLER if request.mode == "auto" else ()), request.mode)):
        asked = replace(request, mode=mode)
        tried, least, refusals = _searched(contexts, cluster, asked, report, found.seconds if found else beat)
        found = tried or found
    if found is None:
        if math.isinf(beat):
            raise refusals[0]
        return None
    return pipelined_plan(found, least, ctx, request, time.perf_counter() - start), found.problem


def _stages_for(ctx: Context, cluster: Cluster) -> str:
    """The numbers of stages that a program can have on a cluster."""
    most = len(ctx.segmented.segments)
    return " or ".join(str(n) for n in range(1, min(most, cluster.size) + 1) if cluster.size % n == 0)


def _shapes(ctx: Context, cluster: Cluster, request: Request) -> list[pipelines.Shape]:
    """The stages, micro-batches and meshes to try."""
    return pipelines.shapes_to_try(cluster, batch_of(ctx), len(ctx.segmented.segments), stage_meshes(request, cluster),
                                   request.micro_batches)


def _searched(contexts: pipelines.MicroContexts, cluster: Cluster, request: Request, report: Report, beat: float,
              ) -> tuple[pipelines.Found | None, float, list[AutoparError]]:
    """As `pipelines.search`, in the request's own mode."""
    meshes, shapes = stage_meshes(request, cluster), _shapes(contexts.whole, cluster, request)
    size, shape = next(iter(meshes.items()))
    setting = request.setting(cluster, shape[0], stages=cluster.size // size)
    return pipelines.search(contexts, cluster, shapes,
                            pipelines.Asked(setting, request.solver, STAGES_LIMIT_S, report,
                                            request.layout.devices(cluster.size) if request.layout else ()), beat)


def pipelined_plan(found: pipelines.Found, least: float, ctx: Context, request: Request, spent: float) -> Plan:
    """The plan of what was found; `ctx` is the program of the whole batch."""
    setting, assembled = found.problem.setting, found.assembled
    program = ctx.segmented.factored.program
    gap = max(0.0, 1.0 - least / found.seconds)
    return Plan(
        request.model, program_key(ctx), setting.cluster.name, setting.cluster.key(), setting.mesh.shape, request.mode,
        program.precision, request.optimizer, status_of(gap), gap,
        pipelines.seconds_of(found.assembly, assembled.taken, found.schedule),
        pipelines.bytes_of(found.assembly, assembled.taken), planned_ops(found.decision),
        planned_parameters(found.decision), attention_told(program), fallback_ops(ctx),
        len(found.problem.instance.nodes), edge_count(found.problem.instance), spent, workload_of(ctx),
        peak_flops_per_s(setting.cluster, program.precision), pipelining=pipelines.pipelining_of(found),
        checkpoints=planned_checkpoints(found.executable, setting),
        segments=pipelines.segments_of(found))


def _of_one_stage(ctx: Context, cluster: Cluster, request: Request, report: Report) -> tuple[Plan, Problem]:
    start = time.perf_counter()
    if ctx.segmented.factored.program.training:
        found = _within(ctx, cluster, request, report)
    else:
        found = settled(_sharded(ctx, cluster, request, report))
    return _plan(found, request, time.perf_counter() - start), found.problem


@dataclass(frozen=True, eq=False)
class Found:
    """A decided problem, lowered, its seconds, and a proven bound of any decision's; its bytes by liveness, None where
    nobody asked for them."""

    problem: Problem
    executable: Executable
    seconds: float
    bound: float
    memory: Memory | None = None


def settled(found: Found | AutoparError) -> Found:
    """What was found. Raises what was found instead."""
    if isinstance(found, AutoparError):
        raise found
    return found


def _sharded(ctx: Context, cluster: Cluster, request: Request, report: Report) -> Found | Infeasible:
    """The best plan that recomputes nothing, over mesh shapes, or that there is none."""
    best: tuple[Solution, Problem, Begun] | None = None
    least = math.inf
    try:
        every = _begun(ctx, cluster, request, report)
    except Infeasible as refusal:
        return refusal
    for problem, begun in every:
        beat = best[0].seconds * (1.0 - TIE) if best else math.inf
        solution = finish(begun, beat, request.solver, SOLVE_LIMIT_S)
        if solution is None:
            report(f"mesh {problem.setting.mesh}: no faster")
            continue
        report(f"mesh {problem.setting.mesh}: {1e3 * solution.seconds:.3f} ms a step, solved in "
               f"{solution.solve_seconds:.2f} s")
        least = min(least, solution.bound)
        if solution.seconds < beat:
            best = solution, problem, begun
    assert best is not None
    solution, problem, _ = best
    executable = lowered(problem.decide(solution.choices), problem.setting)
    return Found(problem, executable, solution.seconds, min(least, solution.seconds))


def _within(ctx: Context, cluster: Cluster, request: Request, report: Report) -> Found:
    """The best plan for training, which may recompute where the budget binds. Raises Infeasible."""
    free = settled(_sharded(ctx, cluster, replace(request, memory_budget=UNLIMITED), report))
    budget = request.setting(cluster, free.problem.setting.mesh.shape).budget
    rough = reprice(free.executable, free.problem.setting)[1]
    if request.memory_budget is None and rough.total <= CLEAR * budget:
        return replace(free, problem=within(free.problem, budget))
    lowerings = Lowerings()
    exact = lowerings.plain(free.executable.decision, free.problem.setting)
    if exact.device <= budget:
        return replace(free, problem=within(free.problem, budget), memory=exact)
    report(f"needs {exact.device / 2**30:.3f} GiB a device without recomputation")
    return _recomputing(ctx, cluster, request, lowerings, report)


def within(problem: Problem, budget: float) -> Problem:
    """The same problem with a budget."""
    return replace(problem, setting=replace(problem.setting, budget=budget),
                   instance=replace(problem.instance, budget=budget))


def _recomputing(ctx: Context, cluster: Cluster, request: Request, lowerings: Lowerings, report: Report) -> Found:
    """The best plan that may recompute. Raises Infeasible."""
    best: Found | None = None
    refusals: list[tuple[Mesh, AutoparError]] = []
    bound = math.inf
    every = _begun(ctx, cluster, replace(request, memory_budget=UNLIMITED), report)
    budget = request.setting(cluster, every[0][0].setting.mesh.shape).budget
    for free, begun in every:
        problem, least = within(free, budget), begun.bound.seconds
        if best and least >= best.seconds * (1.0 - TIE):
            continue
        tried = best_within(problem, lowerings, request.solver, best.seconds if best else math.inf)
        bound, made = min(bound, max(tried.bound, least)), tried.within
        if tried.refusal is not None:
            refusals.append((problem.setting.mesh, tried.refusal))
        if made is not None:
            report(f"mesh {problem.setting.mesh}: {1e3 * made.priced.seconds:.3f} ms a step within the budget")
            best = Found(problem, made.executable, made.priced.seconds, bound, made.memory)
    if best is None:
        program = ctx.segmented.factored.program
        asked = Asked(budget, batch_of(ctx), cluster.size, request.mode, program.precision)
        raise merged(refusals, request.pins, budget, lambda least: what_would_fit(least, asked))
    return replace(best, bound=min(bound, best.seconds))


def what_would_fit(refusal: Infeasible, asked: Asked) -> str:
    """The smallest changes by which what was refused would fit."""
    needed = refusal.least_budget_bytes
    assert needed is not None and refusal.parts is not None
    return remedies(needed, refusal.parts, asked)


def _begun(ctx: Context, cluster: Cluster, request: Request, report: Report) -> list[tuple[Problem, Begun]]:
    """The problem of every mesh shape that has a plan, bounded, the most promising first. Raises AutoparError."""
    found: list[tuple[Problem, Begun]] = []
    refusals: list[tuple[Mesh, AutoparError]] = []
    for shape in shapes_for(request, cluster):
        setting = request.setting(cluster, shape)
        check_batch(ctx, setting)
        try:
            setting = replace(setting, allowed=allowed(ctx, setting.mesh, setting.mode, request.pins))
            problem = build(ctx, setting)
            found.append((problem, begin(problem.instance, solver=request.solver, limit_s=SOLVE_LIMIT_S)))
            report(f"mesh {setting.mesh}: at least {1e3 * found[-1][1].bound.seconds:.3f} ms a step")
        except (Infeasible, PinRefused) as refusal:
            refusals.append((setting.mesh, refusal))
    if not found:
        raise merged(refusals, request.pins, setting.budget)
    return sorted(found, key=lambda each: each[1].bound.seconds)


def _plan(found: Found, request: Request, spent: float) -> Plan:
    executable, problem = found.executable, found.problem
    decision, ctx, setting = executable.decision, problem.context, problem.setting
    priced, rough, items = itemised(executable, setting)
    memory = found.memory or rough
    if abs(priced.seconds - found.seconds) > AGREEMENT * found.seconds:
        raise AssertionError(f"the solver claims {found.seconds} s, the lowered program costs {priced.seconds} s")
    gap = 0.0 if found.seconds <= found.bound else (found.seconds - found.bound) / found.seconds
    program = ctx.segmented.factored.program
    return Plan(
        request.model, program_key(ctx), setting.cluster.name, setting.cluster.key(), setting.mesh.shape, request.mode,
        program.precision, request.optimizer, status_of(gap), gap,
        Seconds(priced.seconds, priced.compute, priced.inline, priced.exposed, priced.optimizer),
        bytes_told(memory), planned_ops(decision), planned_parameters(decision), attention_told(program),
        fallback_ops(ctx), len(problem.instance.nodes), edge_count(problem.instance), spent, workload_of(ctx),
        peak_flops_per_s(setting.cluster, program.precision), request.observed,
        checkpoints=planned_checkpoints(executable, setting), segments=tuple(map(planned_segment, items)))


def bytes_told(memory: Memory) -> Bytes:
    """Bytes as a plan has them."""
    return Bytes(memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.transient,
                 memory.around, memory.moment)


def moment_by_moment(plan: Plan, ctx: Context, cluster: Cluster) -> Plan:
    """The plan with its bytes and its segments' told from the code that runs, where those are the rough sums of what
    ops make and it has no stages. `ctx` is the program that it was made for."""
    if plan.stages or plan.memory.around is not None or not ctx.segmented.factored.program.training:
        return plan
    setting, decision = setting_of(plan, cluster), decision_of(plan, ctx)
    ways = ways_of(lowered(decision, setting), setting)
    memory = memory_of(ways, decision.kept, surrounding_bytes(setting))
    segments = tuple(replace(segment, saved_bytes=saved, held_bytes=held) for segment, (saved, held) in zip(
        plan.segments, bytes_by_call(ways, decision.kept), strict=True))
    return replace(plan, memory=bytes_told(memory), segments=segments)


def planned_segment(item: Item) -> PlannedSegment:
    """A segment of a plan without stages."""
    return PlannedSegment(item.name, *_parts(item.forward), *_parts(item.backward), item.saved, item.held)


def _parts(sums: Sums) -> tuple[float, float, float]:
    return sums.work, sums.inline, sums.exposed


def attention_told(program: Program) -> str:
    """What became of the masks of attention."""
    return ", ".join(n.removeprefix("attention: ") for n in program.notes if n.startswith("attention: "))


def status_of(gap: float) -> str:
    """What a plan with that gap is."""
    return "Optimal" if gap < AGREEMENT else "Feasible"


def edge_count(instance: Instance) -> int:
    """The number of producer-consumer pairs of an instance; what a parameter does inline is another side of its pair.
    """
    pairs = ({flow.name: len(flow.consumers) for flow in segment.flows} for segment in instance.segments)
    return sum(count for by_name in pairs for count in by_name.values())


def planned_ops(decision: Decision) -> tuple[PlannedOp, ...]:
    """Every op of the program with its assignment, layers written out."""
    segmented = decision.context.segmented
    segment = {i: s.name for s in segmented.segments for i in s.ops}
    return tuple(PlannedOp(op.name, segment[i], decision.assignments[i], op_text(decision, i))
                 for i, op in enumerate(segmented.ops))


def planned_parameters(decision: Decision) -> tuple[PlannedParameter, ...]:
    """Every parameter of the program and how it rests."""
    sources = decision.context.segmented.factored.program.sources
    return tuple(PlannedParameter(sources[node.name].name, str(storage), parameter_text(decision, node))
                 for node, storage in decision.storage.items())


def planned_checkpoints(executable: Executable, setting: Setting) -> tuple[PlannedCheckpoint, ...]:
    """What each segment keeps where the plan decides it, equal ones in a row together."""
    decision = executable.decision
    if not decision.kept:
        return ()
    held = saved_by(executable, setting, tally_calls(executable, setting))
    found: list[PlannedCheckpoint] = []
    for call, each in zip(executable.calls, held, strict=True):
        kept = decision.kept[call.segment.name]
        ops = [decision.context.segmented.ops[i].name for i in call.segment.ops]
        numbers = dict.fromkeys(int(name.partition(".")[0]) for name in kept if name[0].isdigit())
        new = PlannedCheckpoint((call.segment.name,), kept, tuple(ops[i] for i in numbers), each.saved, each.transient,
                                each.seconds)
        last = found[-1] if found else None
        if last and (last.names, last.saved, last.seconds) == (new.names, new.saved, new.seconds):
            found[-1] = replace(last, segments=(*last.segments, call.segment.name))
        else:
            found.append(new)
    return tuple(found)


def fallback_ops(ctx: Context) -> tuple[str, ...]:
    """The ops that run replicated because no rule says how to shard them."""
    program = ctx.segmented.factored.program
    trivial = (op for op in ctx.segmented.ops if not op.has_rule and not is_update(op.main, program))
    return tuple(f"{op.name} ({str(op.main.target).removeprefix('aten.')})" for op in trivial)


def price_lowered(decision: Decision, setting: Setting) -> tuple[Priced, Memory]:
    """Lower for one device without connecting to others, and price what comes out."""
    return reprice(lowered(decision, setting), setting)


KEY_OF: dict[Stored, str] = {"by factor": "", "plain": " plain"}
NORM_KEY_OF: dict[BatchNorm, str] = {"whole": "", "micro-batch": " micro-batch"}


def program_key(ctx: Context) -> str:
    """Twelve hexadecimal digits that name the program: its ops, shapes and precision."""
    program = ctx.segmented.factored.program
    found = hashlib.sha256(f"{program.precision} {program.training}{KEY_OF[program.stored]}"
                           f"{NORM_KEY_OF[program.batch_norm]}".encode())
    for node in program.graph.nodes:
        value = node.meta.get("val")
        shape = (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else ()
        found.update(f"{node.op} {node.target} {node.args} {node.kwargs} {shape}".encode())
    return found.hexdigest()[:12]


def decision_of(plan: Plan, ctx: Context) -> Decision:
    """The plan's decision on a program. Raises AutoparError when it was made for another."""
    names = [op.name for op in ctx.segmented.ops]
    planned = {op.name: op.assignment for op in plan.ops}
    _same("ops", names, planned)
    sources = ctx.segmented.factored.program.sources
    parameters = {sources[n.name].name: n for n in ctx.parameters()}
    stored = {p.name: parse_storage(p.storage) for p in plan.parameters}
    _same("parameters", parameters, stored)
    mesh = Mesh(plan.mesh)
    _check_space(ctx, mesh, planned, stored)
    storage = {node: stored[name] for name, node in parameters.items()}
    kept = {segment: each.names for each in plan.checkpoints for segment in each.segments}
    if kept:
        _same("segments", [segment.name for segment in ctx.segmented.segments], kept)
    return Decision(ctx, mesh, tuple(planned[name] for name in names), storage, kept)


def _check_space(ctx: Context, mesh: Mesh, planned: dict[str, Assignment], stored: dict[str, Storage]) -> None:
    """Raises AutoparError unless everything planned is a choice of the widest mode."""
    mode, factored = mode_called("auto"), ctx.segmented.factored
    for op in ctx.segmented.ops:
        choices = assignments(op, mesh, mode, any(r.node in ctx.gradients for r in op.results))
        _check_choice("assignment of op", op.name, planned[op.name], choices)
    for node, users in ctx.parameters().items():
        name = factored.program.sources[node.name].name
        _check_choice("storage of parameter", name, stored[name], storages(factored, node, users, mesh, mode))


def _check_choice(what: str, name: str, planned: object, choices: Iterable[object]) -> None:
    known = list(choices)
    if planned not in known:
        text, *some = (",".join(c) if isinstance(c, tuple) else str(c) for c in (planned, *known[:5]))
        raise AutoparError(f"the plan's {what} {name} is {text!r}, which is none of its {len(known)} choices, such as "
                           f"{'; '.join(some)}; the plan was edited or made by another version: plan again")


def _same(what: str, mine: Iterable[str], planned: Iterable[str]) -> None:
    lacking, extra = sorted(set(mine) - set(planned)), sorted(set(planned) - set(mine))
    if lacking or extra:
        raise AutoparError(f"the plan is for another model: {what} it does not know: {lacking[:3] or 'none'}, {what} "
                           f"the model lacks: {extra[:3] or 'none'}; plan this model again")


def origin_of(plan: Plan, program: Program | Context, given: ClusterLike) -> tuple[Context, Cluster]:
    """The annotated program and the cluster that `plan` was made for. Raises AutoparError when it is for others."""
    if not isinstance(program, Program | Context):
        raise AutoparError(f"program is {told(program)}, needed is what autopar.capture(model, (args, kwargs)) returns")
    cluster, traced = read_cluster(given), program
    if isinstance(traced, Context):
        traced = traced.segmented.factored.program
    if plan.precision != traced.precision:
        raise AutoparError(f"the plan is for precision {plan.precision}, the program was captured in "
                           f"{traced.precision}; capture it by autopar.capture(..., precision={plan.precision!r})")
    ctx = annotated(program, plan)
    check_origin(plan, ctx, cluster)
    return ctx, cluster


def check_origin(plan: Plan, ctx: Context, cluster: Cluster) -> None:
    """Raises AutoparError when the plan is for another model or cluster."""
    if plan.cluster_key != cluster.key():
        raise AutoparError(f"the plan is for cluster {plan.cluster} ({plan.cluster_key}), this is {cluster.name} "
                           f"({cluster.key()}); plan again for this one")
    if plan.program_key != program_key(ctx):
        raise AutoparError(f"the plan is for program {plan.program_key} of {plan.model}, this is {program_key(ctx)}; "
                           "the model, its loss_fn or its input shapes differ: plan again, or capture what the plan "
                           "was made for")


def check_one_stage(plan: Plan, what: str) -> None:
    """Raises AutoparError for a plan with stages, which can't be `what` yet."""
    if plan.stages:
        raise AutoparError(f"the plan has {len(plan.stages)} stages, and only plans without stages can be {what}; plan "
                           "in a mode without stages, such as zero2")


def setting_of(plan: Plan, cluster: Cluster) -> Setting:
    """The setting a plan was made for, with the budget that a device has by default."""
    stages = max(1, len(plan.pipelining.places))
    asked = Request(plan.model, plan.mode, plan.mesh, plan.optimizer, observed=plan.observed)
    setting = asked.setting(cluster, plan.mesh, stages=stages)
    if not plan.stages:
        return setting
    shape = pipelines.Shape(stages, plan.micro_batches, plan.mesh)
    return pipelines.staged_setting(setting, shape, plan.pipelining.layout)


def annotated(program: Program | Context, plan: Plan) -> Context:
    """A captured program, its heads in chunks where `plan` has them so; one that is annotated stays as it is."""
    if not isinstance(program, Program):
        return program
    folded = _folded(program)
    plain = context(annotate(folded))
    if plan.program_key == program_key(plain) or not heads_of(folded):
        return plain
    return context(annotate(ChunkHeads()(folded)))


def verify(plan: Plan, program: Program | Context, cluster: ClusterLike) -> tuple[float, float]:
    """(seconds, bytes) of the plan, recomputed from its lowered program without the solver.

    Raises AutoparError when the plan is for another model or cluster, or its claims are off by more than 1e-6.
    """
    ctx, place = origin_of(plan, program, cluster)
    seconds, nbytes = _recomputed(plan, ctx, setting_of(plan, place))
    _check_claims(plan, ctx, seconds, nbytes)
    return seconds, nbytes


def check_kept(plan: Plan, ctx: Context, cluster: Cluster) -> None:
    """Raises AutoparError as `verify` does, but takes bytes that were told moment by moment as they are: what runs
    would have to be traced for them."""
    if plan.stages or plan.memory.around is None:
        verify(plan, ctx, cluster)
        return
    ctx, place = origin_of(plan, ctx, cluster)
    setting = setting_of(plan, place)
    _check_claims(plan, ctx, price_lowered(decision_of(plan, ctx), setting)[0].seconds, plan.memory.total)


def _check_claims(plan: Plan, ctx: Context, seconds: float, nbytes: float) -> None:
    claims = (("seconds", plan.seconds.step, seconds), ("bytes", plan.memory.total, nbytes),
              ("FLOP", plan.workload.flop, workload_of(ctx).flop))
    for what, claimed, found in claims:
        if abs(claimed - found) > AGREEMENT * abs(found):
            raise AutoparError(f"the plan claims {claimed:.9g} {what}, its lowered program comes to {found:.9g}; it "
                               "was edited or made by another version: plan again")


def _recomputed(plan: Plan, ctx: Context, setting: Setting) -> tuple[float, float]:
    if not plan.stages:
        decision = decision_of(plan, ctx)
        executable = lowered(decision, setting)
        priced, memory = reprice(executable, setting)
        if plan.memory.around is not None:
            memory = memory_of(ways_of(executable, setting), decision.kept, surrounding_bytes(setting))
        return priced.seconds, memory.total
    small, _ = pipelines.MicroContexts(ctx).of(plan.micro_batches)
    return pipelines.recomputed(plan.pipelining, decision_of(plan, small), setting)


def evaluation_storage(decision: Decision) -> dict[str, Storage]:
    """How parameters rest, by plain name, for a program that has to take them as they are."""
    sources = decision.context.segmented.factored.program.sources
    return {sources[n.name].name: storage for n, storage in decision.storage.items()}


def solve_pinned(ctx: Context, setting: Setting, request: Request, stored: dict[str, Storage],
                 recompute: bool = False) -> Decision:
    """The best decision for a program whose parameters rest as another's plan says, within the budget if it is to
    `recompute`. Raises Infeasible."""
    sources = ctx.segmented.factored.program.sources
    whole = Storage(("R",) * len(setting.mesh.shape))
    pinned = {n.name: stored.get(sources[n.name].name, whole) for n in ctx.parameters()}
    relaxed = replace(setting, mode=_relaxed(setting.mode), budget=float("inf"), pinned=pinned)
    problem = build(ctx, relaxed)
    found = problem.decide(optimise(problem.instance, request.solver).choices)
    return recomputing(found, setting, Lowerings(), request.solver).executable.decision if recompute else found


def _relaxed(mode: Mode) -> Mode:
    """A mode for evaluation: the same roles, no matter how the parameters rest and whether the batch is cut."""
    axes = tuple(replace(axis, batch_always=False, storage=frozenset("RZKS")) for axis in mode.axes)
    return replace(mode, axes=axes)
