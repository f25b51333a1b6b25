"""Where an op stands in a lowered program: what a substitute is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from autopar.codegen.communicator import Communicator, Group
from autopar.codegen.draws import Part, Samples
from autopar.core.spec import Spec
from autopar.passes.exchanges import Cut
from autopar.passes.factors import Factored
from autopar.passes.micro import SAMPLE_STRIDE
from autopar.passes.ops import Op
from autopar.passes.strategies import Assignment

Draws = Literal["by element", "by kernel"]
"""How attention draws dropout: the same mask under every plan, or as a fused kernel likes, distinct by shard."""


@dataclass(frozen=True, eq=False)
class Site:
    """Where an op stands: its node, the op it is in, what each axis does, the spec of its result.

    `samples` are those of a micro-batch, where its program is one's.
    """

    node: fx.Node
    op: Op
    assignment: Assignment
    spec: Spec
    factored: Factored
    communicator: Communicator
    draws: Draws = "by element"
    samples: Samples | None = None

    @property
    def part(self) -> Part | None:
        """What of the whole batch's result the node's is, where its program is a micro-batch's and it has samples."""
        stride = self.node.meta.get(SAMPLE_STRIDE)
        return Part(self.samples, stride) if self.samples is not None and stride is not None else None

    def axes(self, *letters: str) -> tuple[int, ...]:
        """The axes over any factor of `letters`."""
        return Cut(self.op, self.assignment, self.communicator.mesh).axes(*letters)

    def group(self, axes: tuple[int, ...]) -> Group:
        """This rank's group along `axes`; itself alone when there are none."""
        return self.communicator.group(axes)
