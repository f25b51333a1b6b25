"""The programs of one model, for training and for evaluation, planned by rank 0 and lowered on every rank."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopar import launch
from autopar.codegen.arrivals import input_specs
from autopar.codegen.batches import Batches, BatchKind, Plans
from autopar.codegen.calls import Form, form_of
from autopar.codegen.communicator import Axes, Communicator, connect
from autopar.codegen.compiled import BY_STAGE, COMPILERS, RECORDS, Compiler
from autopar.codegen.control import all_equal
from autopar.codegen.draws import Samples
from autopar.codegen.executable import Executable, build
from autopar.codegen.holding import Site
from autopar.codegen.lower import Target
from autopar.codegen.offers import grown_to
from autopar.codegen.parameters import device_mesh
from autopar.codegen.ranks import check_alike, on_rank_zero, together
from autopar.codegen.replay import Launches
from autopar.codegen.runtime import ParallelModule
from autopar.codegen.site import Draws
from autopar.codegen.staging import Layout, Staging, device_mesh_of, every_stage, holding_of, line_of
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError, CaptureError
from autopar.core.mesh import Mesh
from autopar.core.observed import Observed
from autopar.core.reshard import Price
from autopar.core.schedules import Schedule
from autopar.hush import hushed
from autopar.material import Material
from autopar.passes.additive import additive
from autopar.passes.blame import blame
from autopar.passes.capture import BatchNorm, Head, Precision, Returns, Stored, capture, meta_twin, warn_of_changes
from autopar.passes.decision import Context, Decision, batch_axes
from autopar.passes.lookups import checked
from autopar.passes.micro import Micro
from autopar.passes.problem import Setting
from autopar.passes.rules.nodes import attention_dropout
from autopar.pipelines import MicroContexts, Shape, staged_setting
from autopar.plan import Plan
from autopar.plan_cache import kept_in, solve_or_recall
from autopar.planner import (
    Report,
    Request,
    decision_of,
    evaluation_storage,
    prepare,
    program_key,
    setting_of,
    solve_pinned,
)
from autopar.profiling import Bench, Costs, profiled
from autopar.report import reporter, stage_reporter
from autopar.stepping import follow
from autopar.timeline import draw_seen

log = logging.getLogger("autopar")
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""
LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Order:
    """What `compile` was asked for, beyond the model and its inputs. `plan` is there on rank 0 alone."""

    cluster: Cluster
    request: Request
    precision: Precision
    loss_fn: LossFn | None
    plan: Plan | None
    batch: BatchKind | None
    returns: Returns
    compiler: Compiler
    material: Material
    stored: Stored = "by factor"
    draws: Draws = "by element"
    head: Head = "auto"
    costs: Costs = "roofline"
    batch_norm: BatchNorm = "whole"

    @property
    def launches(self) -> Launches:
        """How steps are launched: a budget of bytes has no room for what recorded ones keep for themselves."""
        return RECORDS[self.compiler] if self.request.memory_budget is None else "each"


def compiled(model: nn.Module, call: Call, order: Order) -> ParallelModule:
    """Capture on every rank, plan on rank 0, lower and shard on every rank. Raises AutoparError on all of them."""
    programs = together(lambda: Programs(_twin(model), call, order))
    made, ctx = programs.first(model.training)
    if made.stages:
        module = _pipelined(model, made, ctx, programs, order)
    else:
        mesh = Mesh(made.mesh)
        site = Site(connect(mesh), device_mesh(mesh, launch.device().type), launch.device(), order.launches)
        decision = decision_of(made, ctx)
        programs.settle(decision, site.communicator)
        plans = _plans(programs, ctx, mesh, decision, form_of(model, order.loss_fn))
        module = ParallelModule(model, decision, site, Batches(plans), order.material.values(model, site.device))
        module.reporter = reporter(made, decision, setting_of(made, order.cluster))
    module.plan, module.drawer = made, partial(draw_seen, made)
    follow(module, model)
    if order.draws == "by kernel" and any(_drops(node) for node in ctx.segmented.factored.program.graph.nodes):
        log.info("dropout inside of attention is drawn by its kernels, another mask on each rank; exact_dropout=True "
                 "draws the same under every plan")
    return module


def _plans(programs: Programs, ctx: Context, mesh: Mesh, decision: Decision, form: Form, grain: int = 1) -> Plans:
    """Where executables come from; `mesh` holds all ranks, those of the decision's axes first."""
    ways = _ways(batch_axes(decision), tuple(mesh.axes), programs.kind)
    return Plans(programs.executable, ctx.segmented.factored.program, mesh, ways,
                 batch_axes(decision) if batch_axes(decision) in ways else ways[0], additive(ctx), form, programs.twin,
                 grain)


def _pipelined(model: nn.Module, made: Plan, ctx: Context, programs: Programs, order: Order) -> ParallelModule:
    """The module of a plan with stages."""
    if order.returns != "loss":
        raise AutoparError("a pipeline returns its loss alone, other outputs are on its last stage, a micro-batch "
                           "each; leave returns=\"all\" out, or use a mode without stages")
    layout = Layout(tuple(stage.first for stage in made.stages), made.mesh, made.pipelining.places, made.micro_batches,
                    cast(Schedule, made.schedule))
    small, cut = programs.micros(ctx).of(made.micro_batches)
    decision = decision_of(made, small)
    line = line_of(layout, launch.device())
    site = Site(line.inside, device_mesh_of(layout, launch.device().type), launch.device())
    programs.settle(decision, site.communicator, Staging(layout, line), cut)
    stages = every_stage(build(Target(decision, site.communicator, programs.price, launch.device())), layout)
    grain = made.micro_batches * made.devices
    plans = _plans(programs, ctx, layout.whole, decision, form_of(model, order.loss_fn), grain)
    module = ParallelModule(model, decision, site, Batches(plans), order.material.values(model, site.device),
                            holding_of(model, stages, layout, line))
    module.reporter = stage_reporter(made, layout.place)
    return module


def _drops(node: fx.Node) -> bool:
    attends = node.target is torch.ops.aten.scaled_dot_product_attention.default
    return attends and attention_dropout(node) > 0.0


def _ways(cut: Axes, every: Axes, kind: BatchKind | None) -> tuple[Axes, ...]:
    """Along which axes ranks may bring different samples: none, those that cut the batch, all; local parts never along
    none."""
    parts = tuple(dict.fromkeys(axes for axes in (cut, every) if axes))
    return {"global": ((),), "local": parts, None: ((), *parts)}[kind]


def _twin(model: nn.Module) -> nn.Module:
    try:
        return meta_twin(model)
    except Exception as error:
        raise CaptureError(blame(error, model)) from error


class Programs:
    """The programs of one model, by training mode and shapes: captured, decided and lowered when first needed."""

    def __init__(self, twin: nn.Module, call: Call, order: Order) -> None:
        self.twin, self._call, self._order = twin, call, order
        self._first: list[Decision] = []
        self._decisions: dict[tuple[bool, tuple[Any, ...]], Decision] = {}
        self._communicator: Communicator | None = None
        self._staging: Staging | None = None
        self._cuts: dict[tuple[bool, tuple[Any, ...]], Micro] = {}
        self._micros: dict[int, MicroContexts] = {}
        self.kind = order.batch

    def first(self, training: bool) -> tuple[Plan, Context]:
        """Rank 0's plan, and the program it is for: of the call, or of one with samples added where that is better.

        Raises AutoparError on all ranks when it can't be made, or ranks have different models.
        """
        order = self._order
        programs = candidates(self._call, order.cluster, lambda call: self._context(training, call))
        asked = next(iter(programs))
        if not all_equal(int(asked, 16)):
            check_alike(outlined(programs[asked][0]))
            raise AutoparError("the ranks captured different programs; build the same model with the same inputs on "
                               "all")

        def make() -> str:
            found = order.plan or solve_best(programs, order.cluster, order.request, log.info)
            return json.dumps({"given": order.plan is not None, "plan": found.to_json()})

        told = json.loads(on_rank_zero(make))
        found = Plan.from_json(told["plan"])
        chosen, self._call = programs.get(found.program_key, programs[asked])
        together(lambda: check_fits(found, chosen, order))
        if order.costs == "measured" and not told["given"] and not found.stages:
            bench = Bench(order.cluster, launch.device(), order.compiler, order.draws, kept_in("segments"))
            found = profiled(found, chosen, bench, lambda observed: self._again(chosen, observed))
        return found, chosen

    def _again(self, ctx: Context, observed: tuple[Observed, ...]) -> Plan:
        """Rank 0's plan given what was measured of segments; collective."""
        request = replace(self._order.request, observed=observed)

        def make() -> str:
            return json.dumps(solve_or_recall(ctx, self._order.cluster, request, log.info).to_json())

        return Plan.from_json(json.loads(on_rank_zero(make)))

    def settle(self, decision: Decision, communicator: Communicator, staging: Staging | None = None,
               cut: Micro | None = None) -> None:
        """Take the decision that was made first; parameters rest as it has them. Of a plan with stages it is that of a
        micro-batch, which `cut` is."""
        self._first, self._communicator, self._staging = [decision], communicator, staging
        training = decision.context.segmented.factored.program.training
        self._decisions[training, _shapes(self._call)] = decision
        if cut is not None:
            self._cuts[training, _shapes(self._call)] = cut

    def micros(self, ctx: Context) -> MicroContexts:
        """The programs of micro-batches of a whole batch's."""
        return self._micros.setdefault(id(ctx), MicroContexts(ctx))

    @property
    def price(self) -> Price:
        """Seconds of a collective, as the plan counts them."""
        return self._setting(self._first[0].mesh.shape).price

    def _setting(self, shape: tuple[int, ...]) -> Setting:
        """The setting of the plan's stages, or of its only one."""
        layout = self._staging.layout if self._staging else None
        stages = len(layout.places) if layout else 1
        setting = self._order.request.setting(self._order.cluster, shape, stages=stages)
        if layout is None:
            return setting
        return staged_setting(setting, Shape(stages, layout.micro_batches, shape), layout.devices)

    def _context(self, training: bool, call: Call) -> Context:
        """The annotated program. Raises AutoparError on all ranks."""
        def annotated() -> Context:
            model = self.twin.train(training)
            with hushed():
                program = capture(model, call, self._order.precision, self._order.loss_fn, self._order.returns)
            program = replace(program, stored=self._order.stored, head=self._order.head,
                              batch_norm=self._order.batch_norm)
            warn_of_changes(program)
            return checked(prepare(program, self._order.cluster))
        return together(annotated)

    def _decision(self, training: bool, call: Call) -> Decision:
        """The decision for a mode and shapes; all but the first leave parameters as that one has them."""
        key = training, _shapes(call)
        if key not in self._decisions:
            mesh, stored = self._first[0].mesh, evaluation_storage(self._first[0])
            ctx = self._context(training, call)
            if self._staging is not None:
                parts = self._staging.layout.micro_batches
                ctx, self._cuts[key] = together(lambda: self.micros(ctx).of(parts))
            first = self._first[0].kept if training else {}
            recompute = bool(first) and self._staging is None  # stages keep what they keep of any batch

            def make() -> str:
                found = solve_pinned(ctx, self._setting(mesh.shape), self._order.request, stored, recompute)
                return json.dumps([found.assignments, found.kept])

            assignments, kept = json.loads(on_rank_zero(make))
            sources = ctx.segmented.factored.program.sources
            storage = {n: stored[sources[n.name].name] for n in ctx.parameters()}
            self._decisions[key] = Decision(ctx, mesh, tuple(map(tuple, assignments)), storage,
                                            {segment: tuple(names) for segment, names in kept.items()}
                                            if self._staging is None else dict(first))
        return self._decisions[key]

    def executable(self, training: bool, call: Call, axes: Axes) -> Executable:
        """The lowered program for a mode and a batch whose samples differ between ranks along `axes`."""
        decision = self._decision(training, call)
        assert self._communicator is not None
        inner = tuple(axis for axis in axes if axis < len(decision.mesh.shape))
        target = Target(decision, self._communicator, self.price, launch.device(), input_specs(decision, inner),
                        self._order.draws, "outside")
        if self._staging is None:
            return together(lambda: COMPILERS[self._order.compiler](build(target)))
        cut = self._cuts[training, _shapes(call)]
        samples = Samples(cut.parts, cut.rows, decision.mesh.extent(inner)) if cut.parts > 1 else None
        staged = self._staging.staged(build(replace(target, samples=samples)), cut, axes)
        return together(lambda: staged.compiled(BY_STAGE[self._order.compiler]))  # type: ignore[return-value]


def _shapes(call: Call) -> tuple[Any, ...]:
    return tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in pytree.tree_leaves(call))


def candidates(call: Call, cluster: Cluster, annotate: Callable[[Call], Context]) -> dict[str, tuple[Context, Call]]:
    """By key the program of a call, and where its samples don't divide over the devices one with more of them that
    count for nothing, if there can be such."""
    ctx, fuller = annotate(call), filled_up(call, cluster.size)
    found = {program_key(ctx): (ctx, call)}
    if fuller is not None and not additive(ctx).obstacle:
        more = annotate(fuller)
        found[program_key(more)] = (more, fuller)
    return found


def filled_up(call: Call, parts: int) -> Call | None:
    """`call` on meta with as many samples as divide by `parts`, None where they do."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.ndim]
    rows = tensors[0].shape[0] if tensors else 0
    if rows % parts == 0:
        return None
    full: Call = pytree.tree_map_only(Tensor, lambda x: grown_to(x, rows, -(-rows // parts) * parts), call)
    return full


def solve_best(programs: Mapping[str, tuple[Context, Call]], cluster: Cluster, request: Request,
               report: Report = lambda _: None) -> Plan:
    """The fastest plan over `programs`, which do the same. Raises the first one's AutoparError when none has one."""
    found: list[Plan] = []
    refusals: list[AutoparError] = []
    for ctx, _ in programs.values():
        try:
            found.append(solve_or_recall(ctx, cluster, request, report))
        except AutoparError as refusal:
            refusals.append(refusal)
    if not found:
        raise refusals[0]
    return min(found, key=lambda plan: plan.step_time_s)


def outlined(ctx: Context) -> dict[str, str]:
    """The tensors of a program in words, by the name of what makes each, those that it is given first."""
    graph = ctx.segmented.factored.program.graph
    given = [node for node in graph.nodes if node.op == "placeholder"]
    return {("input " if node.op == "placeholder" else "op ") + node.name:
            f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            for node in (*given, *graph.nodes) if isinstance(value := node.meta.get("val"), torch.Tensor)}


def check_fits(plan: Plan, ctx: Context, order: Order) -> None:
    """Raises AutoparError when a plan is for something else than what was ordered."""
    key, cluster = program_key(ctx), order.cluster
    if order.request.mode not in ("auto", plan.mode):
        raise AutoparError(f"the plan is of mode {plan.mode}, asked for is {order.request.mode}; leave mode= out, or "
                           "plan again")
    if plan.precision != order.precision:
        raise AutoparError(f"the plan is for precision {plan.precision}, this is {order.precision}; pass precision="
                           f"{plan.precision!r}, or plan again")
    if plan.cluster_key != cluster.key() or plan.devices != cluster.size:
        raise AutoparError(f"the plan is for mesh {Mesh(plan.mesh)} of {plan.cluster} ({plan.cluster_key}), this is "
                           f"{cluster} ({cluster.key()}); plan again for this one")
    if plan.program_key != key:
        raise AutoparError(f"the plan is for program {plan.program_key} of {plan.model}, this is {key} of "
                           f"{order.request.model}; the model, the shapes of its inputs, head= or batch_norm= differ: "
                           "plan again")
