"""What written programs call: collectives by the names of `torch.distributed`, and ops that are others on a shard.

A collective names the axes whose ranks take part (`over`) and what its gradient does (`backward`), where there is one.
Dims that are cut are in as many equal parts as ranks take part, in their order on the mesh.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.codegen.collectives import ReduceGradients, convert
from autopar.codegen.communicator import Axes, Communicator, Group, connect
from autopar.codegen.draws import GlobalIndex
from autopar.codegen.executable import Turn, seeds_of
from autopar.codegen.heads import LinearCrossEntropy
from autopar.codegen.primitives import LOCAL
from autopar.codegen.substitute import Attention, BatchNorm, Dropout, Uniform
from autopar.codegen.vocabulary import PLAIN, CrossEntropy, Embedding, Places
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh
from autopar.core.reshard import Primitive, Step
from autopar.core.spec import State

Shape = tuple[int, ...]
_STATES: tuple[State, ...] = (0, "R", "P", "G")
STATES: dict[tuple[Primitive, Primitive], tuple[State, State]] = {
    (step.forward, step.backward): pair
    for pair in [*itertools.permutations(_STATES, 2), (0, 1)] for step in [Step((0,), *pair)]}
"""The states before and after a step, by what it does forward and backward; 0 and 1 stand for dims."""


@dataclass(frozen=True, slots=True)
class Rank:
    """This rank's place on the mesh of a program, and the device it runs on."""

    communicator: Communicator
    device: torch.device

    @classmethod
    def on(cls, shape: Shape, device: torch.device) -> Rank:
        """This rank of a mesh of `shape`; collective. Raises AutoparError unless as many ranks are running."""
        mesh = Mesh(shape)
        if dist.get_world_size() != mesh.size:
            raise AutoparError(f"this program is for mesh {mesh} of {mesh.size} ranks, {dist.get_world_size()} are "
                               f"running; start it with torchrun --nproc-per-node {mesh.size}")
        return cls(connect(mesh), device)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return dist.get_rank() == 0

    def seeds(self, seed: int, count: int) -> tuple[Tensor, ...]:
        """What `count` segments draw random numbers from in the first step of a model seeded with `seed`."""
        return seeds_of(Turn(seed, 0), count, self.device)

    def all_reduce(self, x: Tensor, over: Axes, backward: Primitive | None = None) -> Tensor:
        """The sum of all ranks' `x`."""
        return self._moved(x, over, "all_reduce", backward, ())

    def all_gather(self, x: Tensor, over: Axes, dim: int, backward: Primitive | None = None) -> Tensor:
        """All ranks' parts joined on `dim`."""
        return self._moved(x, over, "all_gather", backward, (dim,))

    def reduce_scatter(self, x: Tensor, over: Axes, dim: int, backward: Primitive | None = None) -> Tensor:
        """This rank's part on `dim` of the sum of all ranks' `x`."""
        return self._moved(x, over, "reduce_scatter", backward, (dim,))

    def all_to_all(self, x: Tensor, over: Axes, source: int, target: int, backward: Primitive | None = None) -> Tensor:
        """From the part on dim `source` of the whole to the part on dim `target`."""
        return self._moved(x, over, "all_to_all", backward, (source, target))

    def slice(self, x: Tensor, over: Axes, dim: int, backward: Primitive | None = None) -> Tensor:
        """This rank's part on `dim`; nothing is sent forward."""
        return self._moved(x, over, "slice", backward, (dim,))

    def pad(self, x: Tensor, over: Axes, dim: int, backward: Primitive | None = None) -> Tensor:
        """Zeros with `x` as this rank's part on `dim`, a partial sum; nothing is sent forward."""
        return self._moved(x, over, "pad", backward, (dim,))

    def mask(self, x: Tensor, over: Axes, backward: Primitive | None = None) -> Tensor:
        """`x` on the first rank and zeros on the others, a partial sum; nothing is sent forward."""
        return self._moved(x, over, "mask", backward, ())

    def identity(self, x: Tensor, over: Axes, backward: Primitive | None = None) -> Tensor:
        """`x`; its gradient is what counts."""
        return self._moved(x, over, "identity", backward, ())

    def _moved(self, x: Tensor, over: Axes, forward: Primitive, backward: Primitive | None,
               dims: tuple[int, ...]) -> Tensor:
        group = self.communicator.group(over)
        if backward is None:
            return LOCAL[forward](x, group, *dims)
        found = iter(dims)
        source, target = (next(found) if isinstance(state, int) else state for state in STATES[forward, backward])
        return convert(x, Step(over, source, target), group)

    def sum_gradients(self, *tensors: Tensor, over: Axes) -> tuple[Tensor, ...]:
        """`tensors` as they are; their gradients are summed over the ranks, in one all-reduce a dtype."""
        return ReduceGradients(over, self.communicator)(tensors)  # type: ignore[no-any-return]

    def batch_norm(self, *operands: Any, samples: Axes, channels: Axes) -> Tensor:
        """Batch norm with the statistics of the samples of all ranks over axes `samples`; its channels are cut over
        `channels`, running statistics are whole."""
        group = self.communicator.group
        return BatchNorm(group(samples), group(channels))(*operands)  # type: ignore[no-any-return]

    def dropout(self, x: Tensor, *operands: Any, seed: Tensor, salt: int, whole: Shape,
                cut: tuple[Axes, ...]) -> Tensor:
        """Dropout that draws by the place of each element in the tensor of shape `whole`, whose dims are `cut`."""
        return Dropout(self._index(whole, cut), salt)(x, *operands, seed=seed)  # type: ignore[no-any-return]

    def uniform(self, shape: Shape, dtype: torch.dtype, *, seed: Tensor, salt: int, whole: Shape,
                cut: tuple[Axes, ...]) -> Tensor:
        """Uniform numbers in [0, 1) of local `shape`, drawn as those of `dropout`."""
        return Uniform(self._index(whole, cut), salt, shape, dtype)(seed=seed)  # type: ignore[no-any-return]

    def attention(self, *operands: Any, seed: Tensor, salt: int, whole: Shape, cut: tuple[Axes, ...],
                  **options: Any) -> Tensor:
        """Scaled dot product attention whose weights, of shape `whole`, have the dropout of `dropout`."""
        attend = Attention(self._index(whole, cut), salt)
        return attend(*operands, **options, seed=seed)  # type: ignore[no-any-return]

    def embedding(self, *operands: Any, whole: Shape, cut: tuple[Axes, ...]) -> Tensor:
        """Lookup in a table whose rows, in factors of sizes `whole`, are cut over `cut`: a partial sum."""
        return Embedding(self._places(whole, cut))(*operands)  # type: ignore[no-any-return]

    def cross_entropy(self, *operands: Any, rows: Axes, classes: Axes, whole: Shape, cut: tuple[Axes, ...],
                      **options: Any) -> Tensor:
        """Cross entropy of rows cut over axes `rows` and classes over `classes`: a partial sum over both."""
        return self._loss("cross_entropy", rows, classes, self._places(whole, cut))(  # type: ignore[no-any-return]
            *operands, **options)

    def linear_cross_entropy(self, *operands: Any, rows: Axes, classes: Axes, whole: Shape,
                             cut: tuple[Axes, ...]) -> Tensor:
        """Linear layer and cross entropy of rows cut over axes `rows` and classes over `classes`, in chunks of rows: a
        partial sum over both."""
        group, places = self.communicator.group, self._places(whole, cut)
        return LinearCrossEntropy(group(rows), group(classes), places)(*operands)  # type: ignore[no-any-return]

    def nll_loss(self, *operands: Any, rows: Axes, classes: Axes, whole: Shape, cut: tuple[Axes, ...],
                 **options: Any) -> Tensor:
        """The same of log-probabilities."""
        return self._loss("nll_loss", rows, classes, self._places(whole, cut))(  # type: ignore[no-any-return]
            *operands, **options)

    def _loss(self, kind: str, rows: Axes, classes: Axes, places: Places) -> CrossEntropy:
        group = self.communicator.group
        return CrossEntropy(group(rows), group(classes), places, PLAIN[kind])

    def _groups(self, cut: tuple[Axes, ...]) -> tuple[Group, ...]:
        return tuple(self.communicator.group(axes) for axes in cut)

    def _index(self, whole: Shape, cut: tuple[Axes, ...]) -> GlobalIndex:
        return GlobalIndex(whole, self._groups(cut))

    def _places(self, whole: Shape, cut: tuple[Axes, ...]) -> Places:
        return Places(whole, self._groups(cut))
