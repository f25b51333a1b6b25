"""The calls a user makes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch.distributed as dist
from torch import nn

from autopar import launch
from autopar.arguments import (
    ClusterLike,
    one_of,
    read_budget,
    read_cluster,
    read_counts,
    read_layout,
    read_mesh,
    read_pins,
    read_plan,
)
from autopar.codegen.batches import BatchKind
from autopar.codegen.compiled import COMPILERS, Compiler, compiler_for
from autopar.codegen.control import all_there
from autopar.codegen.ranks import check_alike, together
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.deferred import DeferredModule
from autopar.hush import hushed
from autopar.material import Material, read_material
from autopar.passes.blame import check_call
from autopar.passes.capture import COMPUTE_DTYPE, BatchNorm, Head, Precision, Returns, Stored, capture, warn_of_changes
from autopar.passes.costs import OPTIMIZERS
from autopar.passes.decision import Context
from autopar.passes.lookups import checked
from autopar.passes.modes import MODES
from autopar.plain import check_plain
from autopar.plan import Plan
from autopar.planner import Request, check_shapes, prepare, with_stages
from autopar.profiling import Costs
from autopar.programs import Call, LossFn, Order, candidates, compiled, solve_best
from autopar.solver.model import SOLVERS

Inputs = Any
MeshLike = str | int | Sequence[int]
Ranks = Sequence[Sequence[int]]
PlanLike = Plan | str | os.PathLike[str]
log = logging.getLogger("autopar")
STORED: dict[bool, Stored] = {False: "by factor", True: "plain"}
_WORDS: dict[str, Iterable[str]] = {"mode": MODES, "optimizer": OPTIMIZERS, "solver": SOLVERS}


def plan(model: nn.Module, cluster: ClusterLike | None = None, *, inputs: Inputs, loss_fn: LossFn | None = None,
         mode: str = "auto", mesh: MeshLike | None = None, memory_budget: float | str | None = None,
         optimizer: str = "adamw", precision: Precision = "bf16-mixed", solver: str = "cbc",
         returns: Returns = "loss", pins: Mapping[str, str] | None = None, keep_shapes: bool = False,
         head: Head = "auto", pp: int | None = None, dp: int | None = None, tp: int | None = None,
         micro_batches: int | None = None, batch_norm: BatchNorm = "whole", ppranks: Ranks | None = None,
         dpranks: Ranks | None = None) -> Plan:
    """The best plan for training `model` on `cluster`, without running anything.

    `cluster` is a Cluster, the text of a preset or the path of a file; None is what this machine has. `inputs` are a
    tuple of positional or a dict of keyword arguments with the global batch's shapes. `mesh` is (4, 2) or "4x2";
    `memory_budget` is what a device may hold, bytes or "20GiB". `pins` fix ops to strategies, both as plans print them:
    `{"h_0_attn_c_attn": "S0R = S0R X RR"}`. `returns="all"` plans for outputs besides the loss. `keep_shapes` lets
    parameters rest in the model's own shapes, which optimizers need that look at rows and columns. `head` tells whether
    a linear layer and its cross entropy go in chunks of rows, so that there are never all logits: "auto" where that is
    predicted to be quicker, "chunked" wherever it can be, "plain" nowhere. `pp` fixes the number of a pipeline's
    stages, `micro_batches` that of a step, `dp` and `tp` the axes of a stage's mesh that cut batch and parameters.
    `batch_norm="micro-batch"` takes statistics of each micro-batch, without which a model with batch norm has but one:
    it then trains as one process does that adds up gradients. `ppranks` are the ranks of each pipeline, stage by stage,
    `dpranks` those that hold the same stage: a layout by hand, which a mesh takes row by row. A plan made before is
    read again. Raises AutoparError.
    """
    check_plain(model, loss_fn)
    one_of("returns", returns, get_args(Returns))
    one_of("head", head, get_args(Head))
    one_of("batch_norm", batch_norm, get_args(BatchNorm))
    request = _request(model, precision, mode=mode, mesh=mesh, optimizer=optimizer, memory_budget=memory_budget,
                       solver=solver, pins=pins, counts=(pp, dp, tp, micro_batches), ranks=(ppranks, dpranks))
    if returns == "all" and not with_stages(request):
        request = replace(request, stages=1)  # which bring the loss alone
    call = _call(model, inputs, loss_fn)
    place = _place(cluster, request)

    def annotated(given: Call) -> Context:
        with hushed():
            program = replace(capture(model, given, precision, loss_fn, returns),
                              stored=STORED[bool(keep_shapes)], head=head, batch_norm=batch_norm)
        warn_of_changes(program)
        return checked(prepare(program, place))

    return solve_best(candidates(call, place, annotated), place, request)


@all_there()
def compile(model: nn.Module, cluster: ClusterLike | None = None, *, inputs: Inputs = None,
            batch: BatchKind | None = None, loss_fn: LossFn | None = None, mode: str = "auto",
            mesh: MeshLike | None = None, plan: PlanLike | None = None, memory_budget: float | str | None = None,
            optimizer: str = "adamw", precision: Precision = "bf16-mixed", solver: str = "cbc",
            returns: Returns = "loss", pins: Mapping[str, str] | None = None, compiler: Compiler | None = None,
            init: str | os.PathLike[str] | None = None, keep_shapes: bool = False,
            exact_dropout: bool | None = None, head: Head = "auto", costs: Costs = "roofline", pp: int | None = None,
            dp: int | None = None, tp: int | None = None, micro_batches: int | None = None,
            batch_norm: BatchNorm = "whole", ppranks: Ranks | None = None,
            dpranks: Ranks | None = None) -> nn.Module:
    """The plain `model`, running in parallel on all ranks as the best plan says.

    `inputs` describe the global batch (a tuple of positional or a dict of keyword arguments); without them the first
    call is traced. `batch="global"` means that every rank passes the whole batch, `"local"` each its own part, of
    whatever size; when omitted, shapes tell. `loss_fn(output, target)` makes a loss of a model that returns none: its
    target is the last positional argument of a call. `returns="all"` keeps outputs besides the loss, as DTensors that
    lie as the plan leaves them; with a `loss_fn` the model then returns (loss, output). A `plan`, or the path of one
    that rank 0 can read, skips solving. `compiler` is "inductor", which compiles each class of equal segments once, in
    the first step, and on GPUs without a `memory_budget` records the third step and replays it as a CUDA graph from
    then on, "inductor-no-cudagraphs", or "eager", which runs segments as they are, for debugging; the default is
    "inductor" on GPUs that Triton knows and "eager" on CPUs, where Inductor takes a minute for what eager code trains
    in. `init` gives a model that was built under `autopar.empty()` its values: the path of a checkpoint that all ranks
    see (safetensors, a folder of them, or one of `autopar.save_checkpoint`), or "model", its own initialisation. With
    `exact_dropout` all dropout draws the same mask under every plan; without it, the default on GPUs, that inside of
    attention is left to the fused kernel, which is faster and draws another on each rank. `costs` is what computing is
    taken to last: "roofline" goes by the cluster's figures, "measured" compiles and runs each segment that a plan would
    run and plans again with that. All else is as in `autopar.plan`. Raises AutoparError on every rank alike.
    """
    def asked() -> tuple[Request, Call | None, Material]:
        if batch is not None:
            one_of("batch", batch, get_args(BatchKind))
        if compiler is not None:
            one_of("compiler", compiler, COMPILERS)
        one_of("costs", costs, get_args(Costs))
        decided = [name for name, value in (("mesh", mesh), ("memory_budget", memory_budget), ("pins", pins),
                                            ("pp", pp), ("dp", dp), ("tp", tp), ("micro_batches", micro_batches),
                                            ("ppranks", ppranks), ("dpranks", dpranks)) if value]
        if plan is not None and decided:
            raise AutoparError(f"a plan is given, which decides all, and {', '.join(decided)}, which are for making "
                               "one; give one of them")
        one_of("returns", returns, get_args(Returns))
        one_of("head", head, get_args(Head))
        one_of("batch_norm", batch_norm, get_args(BatchNorm))
        check_plain(model, loss_fn)
        material = read_material(init, model)
        request = _request(model, precision, mode=mode, mesh=mesh, optimizer=optimizer, memory_budget=memory_budget,
                           solver=solver, pins=pins, counts=(pp, dp, tp, micro_batches), ranks=(ppranks, dpranks))
        if returns == "all" and with_stages(request):
            raise AutoparError("a pipeline returns its loss alone, other outputs are on its last stage, a micro-batch "
                               "each; leave returns=\"all\" out, or use a mode without stages")
        if inputs is None and with_stages(request):
            raise AutoparError(f"mode {request.mode} with stages wants to know the batch beforehand: a rank holds the "
                               "parameters of its stage alone; give inputs= to autopar.compile")
        if (inputs is None or returns == "all") and not with_stages(request):
            request = replace(request, stages=1)  # stages hold parts of the model, and no output but the loss
        return request, None if inputs is None else _call(model, inputs, loss_fn), material

    def ordered() -> Order:
        place = _place(cluster, request)
        if place.size != dist.get_world_size():
            raise AutoparError(f"cluster {place.name} has {place.size} devices, {dist.get_world_size()} ranks are "
                               "running; start as many ranks as the cluster has devices, or name another cluster")
        strange = launch.strangeness(place, launch.kind_of(launch.device()))
        if strange:
            log.warning(strange)
        read = read_plan(plan) if plan is not None and dist.get_rank() == 0 else None
        return Order(place, request, precision, loss_fn, read, batch, returns,
                     compiler_for(launch.device(), compiler), material, STORED[bool(keep_shapes)],
                     "by element" if exact_dropout or launch.device().type == "cpu" else "by kernel", head,
                     costs, batch_norm)

    request, call, material = together(asked)  # by each rank alone where they have not met yet
    launch.init()
    order = together(ordered)
    together(material.check)
    check_alike({"inputs=": "absent" if call is None else "given"} | _told(model, order))
    return DeferredModule(model, order) if call is None else compiled(model, call, order)


def _told(model: nn.Module, order: Order) -> dict[str, str]:
    """What every rank has to be given alike, by what it is called."""
    asked = order.request
    words = {"the model": type(model).__name__, "mode": asked.mode, "mesh": asked.mesh, "optimizer": asked.optimizer,
             "precision": order.precision, "returns": order.returns, "batch": order.batch, "compiler": order.compiler,
             "the loss_fn": "absent" if order.loss_fn is None else "given", "the stored shape": order.stored,
             "costs": order.costs, "head": order.head, "batch_norm": order.batch_norm, "pp": asked.stages,
             "micro_batches": asked.micro_batches, "ppranks": asked.layout}
    parameters = {f"parameter {name}": f"{tuple(p.shape)} of {p.dtype}, {'trained' if p.requires_grad else 'frozen'},"
                  for name, p in model.named_parameters()}
    return {word: str(value) for word, value in words.items()} | parameters


def arguments(inputs: Inputs) -> Call:
    """`inputs` as (args, kwargs)."""
    if isinstance(inputs, dict):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _call(model: nn.Module, inputs: Inputs, loss_fn: LossFn | None) -> Call:
    """`inputs` as (args, kwargs). Raises AutoparError where they can't be a model's."""
    call = arguments(inputs)
    check_call(model, call, loss_fn)
    return call


def _request(model: nn.Module, precision: Precision, **asked: Any) -> Request:
    """What is asked for, every word of it known. Raises AutoparError."""
    one_of("precision", precision, COMPUTE_DTYPE)
    mode, optimizer, solver = (one_of(name, asked[name], known) for name, known in _WORDS.items())
    mesh, budget, pins = (asked[name] for name in ("mesh", "memory_budget", "pins"))
    stages, inner, parts = read_counts(asked["counts"], None if mesh is None else read_mesh(mesh))
    layout = read_layout(*asked["ranks"])
    return Request(type(model).__name__, mode, inner, optimizer, None if budget is None else read_budget(budget),
                   solver, () if pins is None else read_pins(pins), micro_batches=parts, layout=layout,
                   stages=stages or (layout.stages if layout else None))


def _place(cluster: ClusterLike | None, request: Request) -> Cluster:
    """The cluster, on which what is asked for has a mesh. Raises AutoparError."""
    place = read_cluster(cluster) if cluster is not None else launch.local_cluster(
        dist.get_world_size() if dist.is_initialized() else 1)
    check_shapes(request, place)
    return place
