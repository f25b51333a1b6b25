"""The programs of one model, for training and for evaluation, planned by rank 0 and lowered on every rank."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, fx, nn

from autopar import launch
from autopar.codegen.batches import Batches, BatchKind, all_equal
from autopar.codegen.calls import form_of
from autopar.codegen.communicator import Communicator, connect
from autopar.codegen.compiled import COMPILERS, Compiler
from autopar.codegen.executable import Executable, batch_spec, build
from autopar.codegen.lower import Target
from autopar.codegen.parameters import device_mesh
from autopar.codegen.runtime import ParallelModule, Site
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError, CaptureError
from autopar.core.mesh import Mesh
from autopar.core.spec import Spec
from autopar.hush import hushed
from autopar.material import Material
from autopar.passes.blame import blame
from autopar.passes.capture import Precision, Stored, capture, meta_twin
from autopar.passes.decision import Context, Decision
from autopar.passes.lookups import checked
from autopar.plan import Plan
from autopar.plan_cache import solve_or_recall
from autopar.planner import Request, decision_of, evaluation_storage, prepare, program_key, solve_pinned
from autopar.ranks import on_rank_zero, together

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
    compiler: Compiler
    material: Material
    stored: Stored = "by factor"


def compiled(model: nn.Module, call: Call, order: Order) -> ParallelModule:
    """Capture on every rank, plan on rank 0, lower and shard on every rank. Raises AutoparError on all of them."""
    programs = together(lambda: Programs(_twin(model), call, order))
    training = model.training
    ctx = programs.context(training)
    made = programs.planned(ctx)
    mesh = Mesh(made.mesh)
    site = Site(connect(mesh), device_mesh(mesh, launch.device().type), launch.device())
    programs.settle(training, decision_of(made, ctx), site.communicator)
    batches = Batches(programs.executable, order.batch, dist.get_world_size(), form_of(model, order.loss_fn))
    module = ParallelModule(model, programs.decision(training), site, batches,
                            order.material.values(model, site.device))
    module.plan = made
    return module


def _twin(model: nn.Module) -> nn.Module:
    try:
        return meta_twin(model)
    except Exception as error:
        raise CaptureError(blame(error, model)) from error


class Programs:
    """The programs of one model, by training mode: captured, decided and lowered when first needed."""

    def __init__(self, twin: nn.Module, call: Call, order: Order) -> None:
        self._twin, self._call, self._order = twin, call, order
        self._decisions: dict[bool, Decision] = {}
        self._communicator: Communicator | None = None

    def context(self, training: bool) -> Context:
        """The annotated program. Raises AutoparError on all ranks."""
        def annotated() -> Context:
            model = self._twin.train(training)
            with hushed():
                program = capture(model, self._call, self._order.precision, self._order.loss_fn)
            return checked(prepare(replace(program, stored=self._order.stored)))
        return together(annotated)

    def planned(self, ctx: Context) -> Plan:
        """Rank 0's plan. Raises AutoparError on all ranks when it can't be made, or ranks have different models."""
        if not all_equal(int(program_key(ctx), 16)):
            raise AutoparError("the ranks captured different programs; build the same model with the same inputs on "
                               "all")
        order = self._order

        def make() -> str:
            found = order.plan or solve_or_recall(ctx, order.cluster, order.request, log.info)
            return json.dumps(found.to_json())

        found = Plan.from_json(json.loads(on_rank_zero(make)))
        together(lambda: check_fits(found, ctx, order))
        return found

    def settle(self, training: bool, decision: Decision, communicator: Communicator) -> None:
        """Take the decision for the mode the model was compiled in."""
        self._decisions[training], self._communicator = decision, communicator

    def decision(self, training: bool) -> Decision:
        """The decision for a mode; the second one leaves parameters as the first has them."""
        if training not in self._decisions:
            first = self._decisions[not training]
            ctx = self.context(training)

            def make() -> str:
                found = solve_pinned(ctx, self._order.cluster, self._order.request, first.mesh.shape,
                                     evaluation_storage(first))
                return json.dumps(found.assignments)

            assigned = tuple(tuple(a) for a in json.loads(on_rank_zero(make)))
            stored = evaluation_storage(first)
            sources = ctx.segmented.factored.program.sources
            storage = {n: stored[sources[n.name].name] for n in ctx.parameters()}
            self._decisions[training] = Decision(ctx, first.mesh, assigned, storage)
        return self._decisions[training]

    def executable(self, training: bool, kind: BatchKind) -> Executable:
        """The lowered program for a mode and for whole or local batches."""
        decision = self.decision(training)
        assert self._communicator is not None
        price = self._order.cluster.pricer(decision.mesh)
        inputs = _input_specs(decision) if kind == "local" else {}
        lowered = build(Target(decision, self._communicator, price, launch.device(), inputs))
        return COMPILERS[self._order.compiler](lowered)


def check_fits(plan: Plan, ctx: Context, order: Order) -> None:
    """Raises AutoparError when a plan is for something else than what was ordered."""
    key, cluster = program_key(ctx), order.cluster
    if order.request.mode not in ("auto", plan.mode):
        raise AutoparError(f"the plan is of mode {plan.mode}, asked for is {order.request.mode}; leave mode= out, or "
                           "plan again")
    if plan.precision != order.precision:
        raise AutoparError(f"the plan is for precision {plan.precision}, this is {order.precision}; pass precision="
                           f"{plan.precision!r}, or plan again")
    if plan.cluster_key != cluster.key() or Mesh(plan.mesh).size != cluster.size:
        raise AutoparError(f"the plan is for mesh {Mesh(plan.mesh)} of {plan.cluster} ({plan.cluster_key}), this is "
                           f"{cluster} ({cluster.key()}); plan again for this one")
    if plan.program_key != key:
        raise AutoparError(f"the plan is for program {plan.program_key} of {plan.model}, this is {key} of "
                           f"{order.request.model}; the model or the shapes of its inputs differ: plan again")


def _input_specs(decision: Decision) -> dict[fx.Node, Spec]:
    """Every input cut along the batch over all ranks."""
    factored = decision.context.segmented.factored
    tensors = [n for n in factored.program.placeholders("input") if isinstance(n.meta.get("val"), Tensor)]
    return {n: batch_spec(decision.context.rank(n), decision.mesh) for n in tensors if factored.flat(n)}
