"""The calls a user makes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopar import launch
from autopar.codegen.batches import Batches, BatchKind, all_equal, digest
from autopar.codegen.communicator import Communicator, connect
from autopar.codegen.executable import Executable, batch_spec, build
from autopar.codegen.lower import Target
from autopar.codegen.parameters import device_mesh, whole_everywhere
from autopar.codegen.runtime import ParallelModule, Site
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh, parse_mesh
from autopar.core.spec import Spec
from autopar.passes.capture import Precision, Program, capture, meta_twin
from autopar.passes.decision import Context, Decision
from autopar.plan import Plan
from autopar.planner import Request, decision_of, evaluation_storage, prepare, program_key, solve, solve_pinned
from autopar.ranks import on_rank_zero

log = logging.getLogger("autopar")
Inputs = Any
LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Order:
    """What `compile` was asked for, beyond the model and its inputs."""

    cluster: Cluster
    request: Request
    precision: Precision
    loss_fn: LossFn | None
    plan: Plan | None
    batch: BatchKind | None


def plan(model: nn.Module, cluster: Cluster | str, *, inputs: Inputs, loss_fn: LossFn | None = None, mode: str = "auto",
         mesh: str | tuple[int, ...] | None = None, memory_budget: float | None = None, optimizer: str = "adamw",
         precision: Precision = "bf16-mixed", solver: str = "cbc", pins: Mapping[str, str] | None = None) -> Plan:
    """The best plan for training `model` on `cluster`, without running anything.

    `inputs` are a tuple of positional or a dict of keyword arguments with the global batch's shapes; `memory_budget` is
    in bytes a device. `pins` fix ops to strategies, both as plans print them: `{"h_0_attn_c_attn": "S0R = S0R X RR"}`.
    Raises AutoparError.
    """
    request = Request(type(model).__name__, mode, _shape(mesh), optimizer, memory_budget, solver,
                      tuple((pins or {}).items()))
    ctx = prepare(capture(model, arguments(inputs), precision, loss_fn))
    return solve(ctx, _cluster(cluster), request)[0]


def compile(model: nn.Module, cluster: Cluster | str | None = None, *, inputs: Inputs = None,
            batch: BatchKind | None = None, loss_fn: LossFn | None = None, mode: str = "auto",
            mesh: str | tuple[int, ...] | None = None, plan: Plan | None = None, memory_budget: float | None = None,
            optimizer: str = "adamw", precision: Precision = "bf16-mixed", solver: str = "cbc",
            pins: Mapping[str, str] | None = None) -> nn.Module:
    """The plain `model`, running in parallel on all ranks as the best plan says.

    `inputs` describe the global batch (a tuple of positional or a dict of keyword arguments); without them the first
    call is traced. `batch="global"` means that every rank passes the whole batch, `"local"` each its own part; when
    omitted, shapes tell. `loss_fn(output, target)` makes a loss of a model that returns none: its target is the last
    positional argument of a call. A `plan` skips solving; `pins` are as in `plan`. Raises AutoparError on every rank
    alike.
    """
    if plan is not None and pins:
        raise AutoparError("a plan is given, which decides all, and pins, which are for making one; give one of them")
    launch.init()
    request = Request(type(model).__name__, mode, _shape(mesh), optimizer, memory_budget, solver,
                      tuple((pins or {}).items()))
    order = Order(_cluster(cluster), request, precision, loss_fn, plan, batch)
    if order.cluster.size != dist.get_world_size():
        raise AutoparError(f"cluster {order.cluster.name} has {order.cluster.size} devices, {dist.get_world_size()} "
                           "ranks are running; start as many ranks as the cluster has devices, or name another cluster")
    if inputs is None:
        return DeferredModule(model, order)
    return _compiled(model, arguments(inputs), order)


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`inputs` as (args, kwargs)."""
    if isinstance(inputs, dict):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _shape(mesh: str | tuple[int, ...] | None) -> tuple[int, ...] | None:
    return parse_mesh(mesh).shape if isinstance(mesh, str) else mesh


def _cluster(cluster: Cluster | str | None) -> Cluster:
    if cluster is None:
        return launch.local_cluster(dist.get_world_size() if dist.is_initialized() else 1)
    return Cluster.preset(cluster) if isinstance(cluster, str) else cluster


def _compiled(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], order: Order) -> ParallelModule:
    """Capture on every rank, plan on rank 0, lower and shard on every rank."""
    programs = Programs(meta_twin(model), call, order)
    training = model.training
    ctx = programs.context(training)
    made = programs.planned(ctx)
    mesh = Mesh(made.mesh)
    site = Site(connect(mesh), device_mesh(mesh, launch.device().type), launch.device())
    programs.settle(training, decision_of(made, ctx), site.communicator)
    batches = Batches(programs.executable, order.batch, dist.get_world_size())
    module = ParallelModule(model, programs.decision(training), site, batches)
    module.plan = made
    return module


class Programs:
    """The programs of one model, by training mode: captured, decided and lowered when first needed."""

    def __init__(self, twin: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], order: Order) -> None:
        self._twin, self._call, self._order = twin, call, order
        self._decisions: dict[bool, Decision] = {}
        self._communicator: Communicator | None = None

    def context(self, training: bool) -> Context:
        """The annotated program. Raises CaptureError."""
        model = self._twin.train(training)
        return prepare(capture(model, self._call, self._order.precision, self._order.loss_fn))

    def planned(self, ctx: Context) -> Plan:
        """Rank 0's plan. Raises AutoparError on all ranks when it can't be made, or ranks have different models."""
        if not all_equal(int(program_key(ctx), 16)):
            raise AutoparError("the ranks captured different programs; build the same model with the same inputs on "
                               "all")
        order = self._order

        def make() -> str:
            found = order.plan or solve(ctx, order.cluster, order.request, log.info)[0]
            return json.dumps(found.to_json())

        found = Plan.from_json(json.loads(on_rank_zero(make)))
        if found.cluster_key != order.cluster.key() or found.program_key != program_key(ctx):
            raise AutoparError(f"the plan is for program {found.program_key} on {found.cluster} ({found.cluster_key}), "
                               f"this is {program_key(ctx)} on {order.cluster} ({order.cluster.key()}); plan again")
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
        return build(Target(decision, self._communicator, price, launch.device(), inputs))


def _input_specs(decision: Decision) -> dict[fx.Node, Spec]:
    """Every input cut along the batch over all ranks."""
    factored = decision.context.segmented.factored
    tensors = [n for n in factored.program.placeholders("input") if isinstance(n.meta.get("val"), Tensor)]
    return {n: batch_spec(decision.context.rank(n), decision.mesh) for n in tensors if factored.flat(n)}


class DeferredModule(nn.Module):
    """A model compiled at its first call.

    Its parameters are DTensors from the start and the same objects afterwards, so that an optimizer may be made before.
    """

    def __init__(self, plain: nn.Module, order: Order) -> None:
        super().__init__()
        self._plain: list[nn.Module] = [plain]
        self._order = order
        self._made: list[ParallelModule] = []
        self._waiting = {name: whole_everywhere(p) for name, p in plain.named_parameters()}
        self.training = plain.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compile for these arguments if none have come before, then run."""
        if not self._made:
            self._made.append(self._compile(args, kwargs))
        return self._made[0](*args, **kwargs)

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ParallelModule:
        leaves = pytree.tree_leaves((args, kwargs))
        whole = self._order.batch == "global" or (self._order.batch is None and all_equal(digest(leaves)))
        world = 1 if whole else dist.get_world_size()
        shapes = [list(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        if not all_equal(digest([shapes])):
            raise AutoparError(f"the ranks' inputs have different shapes, here {shapes}; pass batches of one shape")
        call = pytree.tree_map_only(Tensor, lambda t: _grown(t, world), (args, kwargs))
        made = _compiled(self._plain[0].train(self.training), call, self._order)
        made.adopt(self._waiting)
        return made

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            made = self.__dict__.get("_made")
            if made:
                return getattr(made[0], name)
            raise AttributeError(f"{name} is there after the first call, which compiles the model; give inputs= to "
                                 "compile ahead") from None

    def _current(self) -> nn.Module:
        return self._made[0] if self._made else self._plain[0]

    def train(self, mode: bool = True) -> DeferredModule:
        """As nn.Module's."""
        self.training = mode
        self._current().train(mode)
        return self

    def named_parameters(self, prefix: str = "", recurse: bool = True,
                         remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module's, under the plain model's names."""
        for name, parameter in self._waiting.items():
            yield f"{prefix}.{name}" if prefix else name, parameter

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        return self._current().named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        return self._current().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        return self._current().load_state_dict(*args, **kwargs)


def _grown(tensor: Tensor, world: int) -> Tensor:
    if not tensor.ndim:
        return tensor
    return torch.empty((tensor.shape[0] * world, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")


__all__ = ["Program", "arguments", "compile", "plan"]
