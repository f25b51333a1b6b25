"""The kernels of `rows` in Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from autopar.kernels.rows import IGNORED, Rows

if TYPE_CHECKING:  # what decorators make of functions can't be told
    _sums_kernel: Any
    _slopes_kernel: Any
    _both_kernel: Any
else:
    _IGNORED = tl.constexpr(IGNORED)

    @triton.jit
    def _load(row, at, CLASSES: tl.constexpr, WIDTH: tl.constexpr):
        # WIDTH is a multiple of 64 where CLASSES is odd: a mask by it leaves loads as wide as they can be.
        x = tl.load(row + at, mask=at < WIDTH, other=float("-inf")).to(tl.float32)
        return x if CLASSES == WIDTH else tl.where(at < CLASSES, x, float("-inf"))

    @triton.jit
    def _sum_row(row, CLASSES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        top = float("-inf")
        total = 0.0
        for start in range(0, WIDTH, BLOCK):
            x = _load(row, start + columns, CLASSES, WIDTH)
            higher = tl.maximum(top, tl.max(x, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
            top = higher
        return top + tl.log(total)

    @triton.jit
    def _find(row, place, CLASSES: tl.constexpr):
        found = tl.load(row + place, mask=(place >= 0) & (place < CLASSES), other=0.0).to(tl.float32)
        return tl.where(place < CLASSES, found, float("nan"))

    @triton.jit
    def _slope_row(row, place, total, scale, CLASSES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        times = tl.where(place == _IGNORED, 0.0, tl.load(scale))
        for start in range(0, WIDTH, BLOCK):
            at = start + columns
            x = _load(row, at, CLASSES, WIDTH)
            slope = (tl.exp(x - total) - tl.where(at == place, 1.0, 0.0)) * times
            tl.store(row + at, slope.to(row.dtype.element_ty), mask=at < WIDTH)

    @triton.jit
    def _sums_kernel(logits, place, total, found, stride, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
                     BLOCK: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        row = logits + t * stride
        tl.store(found + t, _find(row, tl.load(place + t), CLASSES))
        tl.store(total + t, _sum_row(row, CLASSES, WIDTH, BLOCK))

    @triton.jit
    def _slopes_kernel(logits, place, total, scale, stride, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
                       BLOCK: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        _slope_row(logits + t * stride, tl.load(place + t), tl.load(total + t), scale, CLASSES, WIDTH, BLOCK)

    @triton.jit
    def _both_kernel(logits, place, total, found, scale, stride, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
                     BLOCK: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        row, at = logits + t * stride, tl.load(place + t)
        tl.store(found + t, _find(row, at, CLASSES))
        sum_of_row = _sum_row(row, CLASSES, WIDTH, BLOCK)
        tl.store(total + t, sum_of_row)
        tl.debug_barrier()  # every thread has read the logit at the row's class before one writes there
        _slope_row(row, at, sum_of_row, scale, CLASSES, WIDTH, BLOCK)


LARGEST_BLOCK, ELEMENTS_A_THREAD = 8192, 16
"""Elements of a row that a program takes at once. So few that those of the rows in flight stay in the cache."""


def _options(width: int) -> dict[str, int]:
    block = min(LARGEST_BLOCK, max(64, 1 << (width - 1).bit_length()))
    return {"BLOCK": block, "num_warps": max(1, min(32, block // ELEMENTS_A_THREAD // 32))}


def _empty_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    assert logits.stride(1) == 1 and logits.dtype.itemsize <= 4
    return tuple(torch.empty(len(logits), dtype=torch.float32, device=logits.device)  # type: ignore[return-value]
                 for _ in range(2))


def _sums(logits: Tensor, place: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    total, found = _empty_sums(logits)
    width = logits.shape[1]
    _sums_kernel[len(logits),](logits, place, total, found, logits.stride(0), classes, width, **_options(width))
    return total, found


def _slopes(logits: Tensor, place: Tensor, total: Tensor, scale: Tensor, classes: int) -> None:
    width = logits.shape[1]
    _slopes_kernel[len(logits),](logits, place, total, scale, logits.stride(0), classes, width, **_options(width))


def _both(logits: Tensor, place: Tensor, scale: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    total, found = _empty_sums(logits)
    width = logits.shape[1]
    _both_kernel[len(logits),](logits, place, total, found, scale, logits.stride(0), classes, width,
                               **_options(width))
    return total, found


ROWS = Rows(_sums, _slopes, _both)
