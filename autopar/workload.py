"""What a step of a program does, and how much of it a cluster could do at its peak."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.passes.capture import COMPUTE_DTYPE, Precision, Program
from autopar.passes.choices import op_work
from autopar.passes.costs import DTYPES
from autopar.passes.decision import Context
from autopar.passes.problem import batch_of
from autopar.planned import Workload

_ALONE = Mesh((1,))
_BACKWARD = 2.0
"""FLOP of the backward over those of the forward: a product for each of the two operands."""


def workload_of(ctx: Context) -> Workload:
    """Samples, tokens and FLOP of a program, as `Workload` counts them.

    Samples are the first dim of the first input; tokens the elements of the first input of whole numbers with two dims.
    """
    inputs = _inputs(ctx.segmented.factored.program)
    texts = [t for t in inputs if t.ndim == 2 and not t.is_floating_point() and t.dtype is not torch.bool]
    return Workload(batch_of(ctx), math.prod(texts[0].shape) if texts else None, model_flop(ctx))


def _inputs(program: Program) -> list[Tensor]:
    values = (node.meta.get("val") for node in program.placeholders("input"))
    return [value for value in values if isinstance(value, Tensor)]


def model_flop(ctx: Context) -> float:
    """FLOP of the whole program, as `Workload` counts them."""
    total = 0.0
    for op in ctx.segmented.ops:
        forward = op_work(ctx, op, ("R",), _ALONE).flop
        through = any(result.node in ctx.gradients for result in op.results)
        total += forward * (1.0 + (_BACKWARD if through else 0.0))
    return total


def peak_flops_per_s(cluster: Cluster, precision: Precision) -> float:
    """FLOP/s of all devices at their peak, in the dtype that a precision computes in."""
    dtype = DTYPES[COMPUTE_DTYPE[precision]]
    return sum(device.peak.table()[dtype] for device in cluster.devices)
