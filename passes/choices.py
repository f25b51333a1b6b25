"""What each way to do an op and each way to keep a parameter costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx

from autopar.core.device import Device
from autopar.core.mesh import Mesh
from autopar.core.sharding import Choice
from autopar.passes.costs import MASTER_BYTES, Optimizer, Work, work_of
from autopar.passes.decision import Context
from autopar.passes.layout import from_base, itemsize, local_bytes, local_shape, whole_bytes
from autopar.passes.ops import Op
from autopar.passes.rules.table import shape, tensor_operands
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
    """The dtype `op` computes in: its result's."""
    value = op.main.meta["val"]
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


def _op_choice(context: Context, op: Op, assignment: Assignment, mesh: Mesh, device: Device) -> Choice:
    work, factored = op_work(context, op, assignment, mesh), context.segmented.factored
    saved = sum(local_bytes(factored, r.node, context.emitted(op, r, assignment), mesh)
                for r in op.results if r.node in context.gradients)
    backward = work.backward_seconds(device) if context.through(op) else 0.0
    return Choice(",".join(assignment), work.forward_seconds(device), backward, 0.0, saved)


def storage_choices(context: Context, node: fx.Node, options: Iterable[Storage], mesh: Mesh, optimizer: Optimizer,
                    device: Device) -> list[Choice]:
    """One choice a storage: the parameter with its gradient and the optimizer's state and step."""
    factored, trained = context.segmented.factored, node in context.gradients
    whole = whole_bytes(factored, node) / itemsize(node)
    held = MASTER_BYTES * (2 if trained else 1) + (optimizer.state_bytes if trained else 0.0)
    found = []
    for storage in options:
        elements = whole / storage.resting_parts(mesh)
        seconds = elements * optimizer.step_bytes / device.memory_bytes_per_s if trained else 0.0
        kept = kept_bytes(context, node, storage, mesh)
        found.append(Choice(str(storage), 0.0, 0.0, seconds, elements * held + kept))
    return found


def kept_bytes(context: Context, node: fx.Node, storage: Storage, mesh: Mesh) -> float:
    """Bytes of a parameter that is gathered once and kept until the backward, in the compute dtype."""
    if not storage.kept:
        return 0.0
    spec = storage.spec(context.rank(node), trained=False)
    return whole_bytes(context.segmented.factored, node) / mesh.extent(spec.axes)
