"""Random numbers by element: a function of a seed and of the element's place in the whole tensor of the whole batch.

A seed's low 32 bits are what is drawn from; those above are the number of the micro-batch, whose samples lie elsewhere
in the batch than in the program that runs them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopar.codegen.communicator import Group

SEED_BITS = 32
_MASK32 = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (in int64) in which every bit depends on every other: MurmurHash3's finaliser."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def draw(index: Tensor, seed: Tensor, salt: int) -> Tensor:
    """Uniform 32-bit numbers: a function of the elements' global `index`, the step's `seed` and the op's `salt`."""
    start = _mixed((seed + salt * 0x9E3779B1) & _MASK32)
    return _mixed(_mixed((index & _MASK32) ^ start) ^ (index >> 32) & _MASK32)


def keep_mask(index: Tensor, seed: Tensor, salt: int, rate: float) -> Tensor:
    """Which elements dropout keeps."""
    return draw(index, seed, salt) >= int(rate * 2**32)


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of a micro-batch, `rows` of them, among those of its batch, which has `parts` micro-batches.

    The batch comes in `pieces` equal pieces, of each of which a micro-batch has one run.
    """

    parts: int
    rows: int
    pieces: int = 1

    def of(self, place: Tensor, micro: Tensor) -> Tensor:
        """The number in the batch of the sample at `place` in micro-batch `micro`."""
        run = self.rows // self.pieces
        return place // run * (run * self.parts) + micro * run + place % run


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a micro-batch as a part of the batch's, in which `stride` elements lie between samples."""

    samples: Samples
    stride: int

    def strides(self, whole: tuple[int, ...], strides: list[int]) -> tuple[list[int], int | None]:
        """Strides of dims in the batch's tensor, and which dim has the samples; None where there is one sample."""
        grown = [each * self.samples.parts if each * size > self.stride * self.samples.rows else each
                 for size, each in zip(whole, strides, strict=True)]
        found = (i for i, each in enumerate(strides) if each == self.stride and whole[i] == self.samples.rows > 1)
        return grown, next(found, None)


class GlobalIndex(nn.Module):
    """The index that each element of a shard has in the whole tensor, whose dims are cut over one group each.

    `whole` is the tensor of the program, which is a `part` of what is whole where that is of a micro-batch.
    """

    def __init__(self, whole: tuple[int, ...], groups: tuple[Group, ...], part: Part | None = None) -> None:
        super().__init__()
        self.whole, self.groups, self.part = whole, groups, part
        self.local = tuple(size // group.size for size, group in zip(whole, groups, strict=True))
        self.parts = tuple(group.index for group in groups)
        self.strides, self.batch = [math.prod(whole[i + 1:]) for i in range(len(whole))], None
        if part is not None:
            self.strides, self.batch = part.strides(whole, self.strides)

    def forward(self, device: torch.device, seed: Tensor) -> Tensor:
        index = self._start(device, seed)
        for i, (size, part, stride) in enumerate(zip(self.local, self.parts, self.strides, strict=True)):
            place = torch.arange(size, device=device) + part * size
            if i == self.batch and self.part is not None:
                place = self.part.samples.of(place, seed >> SEED_BITS)
            index = index.unsqueeze(-1) + place * stride
        return index

    def _start(self, device: torch.device, seed: Tensor) -> Tensor:
        """Where the first element of all lies, but for what the dim of samples adds."""
        if self.part is None or self.batch is not None:
            return torch.zeros((), dtype=torch.int64, device=device)
        return (seed >> SEED_BITS) * self.part.stride
