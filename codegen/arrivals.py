"""What comes into a lowered segment: shape, dtype and whether a gradient flows to it, without values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from autopar.codegen.communicator import Axes
from autopar.codegen.executable import batch_spec
from autopar.codegen.lower import Lowered
from autopar.codegen.offers import batched
from autopar.core.spec import Spec
from autopar.passes.capture import COMPUTE_DTYPE
from autopar.passes.decision import Decision
from autopar.passes.layout import local_shape


@dataclass(frozen=True, slots=True)
class Arrival:
    """One external as it comes in; a parameter that is gathered comes in the compute dtype, another as it rests."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def resting(self) -> Arrival:
        """The same before it is cast to the compute dtype."""
        return replace(self, dtype=torch.float32) if self.dtype.is_floating_point else self

    def blank(self, device: torch.device) -> Tensor:
        """A tensor like it, of zeros."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device, requires_grad=self.differentiable)


def arrivals(lowered: Lowered, decision: Decision, inputs: Mapping[fx.Node, Spec]) -> tuple[Arrival, ...]:
    """The externals of `lowered` in order; `inputs` are the specs of those of the program's inputs that come cut."""
    return tuple(_arrival(node, decision, inputs) for node in lowered.segment.externals)


def input_specs(decision: Decision, axes: Axes) -> dict[fx.Node, Spec]:
    """Every input that has the samples, cut along them over `axes`."""
    placeholders = decision.context.segmented.factored.program.placeholders("input")
    samples = batched(placeholders)
    cut = [n for n, shape in zip(placeholders, samples.shapes, strict=True) if samples.has(shape)]
    return {n: batch_spec(decision.context.rank(n), axes) for n in cut} if axes else {}


def _arrival(node: fx.Node, decision: Decision, inputs: Mapping[fx.Node, Spec]) -> Arrival:
    factored, value = decision.context.segmented.factored, node.meta["val"]
    trained = node in decision.context.gradients
    spec = decision.arrival(node) or inputs.get(node) or Spec(((),) * len(factored.flat(node)))
    dtype = value.dtype
    if node in decision.storage:
        storage, precision = decision.storage[node], factored.program.precision
        spec = storage.spec(len(factored.flat(node)), trained)
        if precision.endswith("-mixed") and dtype == COMPUTE_DTYPE[precision] and not storage.gathered:
            dtype = torch.float32
    learns = trained and (dtype.is_floating_point or dtype.is_complex)
    return Arrival(local_shape(factored, node, spec, decision.mesh), dtype, learns)
