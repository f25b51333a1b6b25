"""What each way to do an op and each way to keep a parameter costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx

from autopar.core.device import Device
from autopar.core.mesh import Mesh
from autopar.core.sharding import Choice
from autopar.passes.costs import Optimizer, Work, work_of
from autopar.passes.decision import Context
from autopar.passes.functional import value_of
from autopar.passes.layout import from_base, itemsize, local_bytes, local_shape, whole_bytes
from autopar.passes.moments import held
from autopar.passes.ops import Op
from autopar.passes.own_ops import LINEAR_CROSS_ENTROPY
from autopar.passes.rules.nodes import shape, tensor_operands
from autopar.passes.strategies import Assignment, Storage, factor_parts


def op_work(context: Context, op: Op, assignment: Assignment, mesh: Mesh) -> Work:
    """The local work of `op` under `assignment`."""
    factored = context.segmented.factored
    read = [(o.node, from_base(context.wanted(op, o, assignment), factored.base(o.node)[1])) for o in op.operands]
    operands = [local_shape(factored, node, spec, mesh) for node, spec in read]
    if not op.has_rule:
        operands = [shape(node) for node in tensor_operands(op.main)]
    nbytes = sum(local_bytes(factored, node, spec, mesh) for node, spec in dict.fromkeys(read))
    results = [(r.node, context.emitted(op, r, assignment)) for r in op.results]
    nbytes += sum(local_bytes(factored, node, spec, mesh) for node, spec in results)
    main = local_shape(factored, *results[0], mesh) if results else ()
    return work_of(op.main, operands, main, nbytes, compute_dtype(op))


def compute_dtype(op: Op) -> torch.dtype:
    """The dtype `op` computes in: its result's, or that of the products inside of a loss."""
    value = value_of(op.main.args[0]) if op.main.target is LINEAR_CROSS_ENTROPY else op.main.meta["val"]
    return value.dtype if isinstance(value, torch.Tensor) else torch.float32


def op_choices(context: Context, op: Op, options: Iterable[Assignment], mesh: Mesh, device: Device) -> list[Choice]:
    """One choice an assignment; those that cut every factor into as many parts cost the same."""
    known: dict[frozenset[tuple[str, int]], Choice] = {}
    found = []
    for assignment in options:
        parts = frozenset(factor_parts(assignment, mesh).items())
        if parts not in known:
            known[parts] = _op_choice(context, op, assignment, mesh, device)
        found.append(replace(known[parts], name=",".join(assignment)))
    return found


def scaled(choices: list[Choice], factor: tuple[float, float]) -> list[Choice]:
    """The choices with their seconds, forward and backward, multiplied."""
    if factor == (1.0, 1.0):
        return choices
    forward, backward = factor
    return [replace(c, forward=forward * c.forward, backward=backward * c.backward) for c in choices]


def _op_choice(context: Context, op: Op, assignment: Assignment, mesh: Mesh, device: Device) -> Choice:
    work, factored = op_work(context, op, assignment, mesh), context.segmented.factored
    saved = sum(local_bytes(factored, r.node, context.emitted(op, r, assignment), mesh)
                for r in op.results if r.node in context.gradients)
    through = context.through(op)
    return Choice(",".join(assignment), work.forward_seconds(device), work.backward_seconds(device) if through else 0.0,
                  saved=saved + (work.beside.kept if through else 0.0), working=work.nbytes + work.beside.room)


def storage_choices(context: Context, node: fx.Node, options: Iterable[Storage], mesh: Mesh, optimizer: Optimizer,
                    device: Device) -> list[Choice]:
    """One choice a storage: the parameter with its gradient and the optimizer's state and step."""
    whole, trained = whole_bytes(context.segmented.factored, node) / itemsize(node), node in context.gradients
    found = []
    for storage in options:
        elements = whole / storage.resting_parts(mesh)
        seconds = elements * optimizer.step_bytes / device.memory_bytes_per_s if trained else 0.0
        kept = held(context, node, storage, mesh, optimizer.state_bytes)
        found.append(Choice(str(storage), 0.0, 0.0, seconds, kept.parameter + kept.state, kept.copy, kept.gradient,
                            kept.working))
    return found
