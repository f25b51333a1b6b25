"""Roofline costs: seconds = max(FLOP / rate, bytes / bandwidth) + launch, and the bytes a device holds.

FLOP and bytes are computed from the local shapes of an op's operands and results, so the same function prices
a strategy before it is lowered and the lowered program itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.core.chunks import rows_at_once
from autopar.core.device import Device, Dtype, Flops
from autopar.core.errors import UnknownName
from autopar.passes.functional import value_of
from autopar.passes.own_ops import LINEAR_CROSS_ENTROPY
from autopar.passes.rules.nodes import argument

aten = torch.ops.aten
Shape = tuple[int, ...]
Flop = Callable[[fx.Node, list[Shape], Shape], float]


def _linear(_: fx.Node, operands: list[Shape], __: Shape) -> float:
    return 2.0 * math.prod(operands[0]) * operands[1][0]


def _matmul(_: fx.Node, operands: list[Shape], result: Shape) -> float:
    return 2.0 * math.prod(result) * operands[0][-1]


def _einsum(node: fx.Node, operands: list[Shape], _: Shape) -> float:
    """Two FLOP for every combination of indices and operand beyond the first."""
    texts = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
    sizes = {letter: size for text, of in zip(texts, operands, strict=True)
             for letter, size in zip(text, of, strict=True)}
    return 2.0 * math.prod(sizes.values()) * (len(texts) - 1)


def _addmm(_: fx.Node, operands: list[Shape], result: Shape) -> float:
    return 2.0 * math.prod(result) * operands[1][-1]


def _convolution(_: fx.Node, operands: list[Shape], result: Shape) -> float:
    return 2.0 * math.prod(result) * math.prod(operands[1][1:])


def _transposed_convolution(_: fx.Node, operands: list[Shape], __: Shape) -> float:
    return 2.0 * math.prod(operands[0]) * math.prod(operands[1][1:])


def _bilinear(_: fx.Node, operands: list[Shape], result: Shape) -> float:
    return 2.0 * math.prod(result) * operands[0][-1] * operands[1][-1]


def _attention(node: fx.Node, operands: list[Shape], _: Shape) -> float:
    """A causal mask halves the work."""
    *outer, queries, depth = operands[0]
    keys, value_depth = operands[1][-2], operands[2][-1]
    share = 0.5 if argument(node, 5, "is_causal", False) else 1.0
    return share * 2.0 * math.prod(outer) * queries * keys * (depth + value_depth)


def _linear_cross_entropy(_: fx.Node, operands: list[Shape], __: Shape) -> float:
    return 2.0 * math.prod(operands[0]) * operands[2][0]


FLOP: dict[Any, Flop] = {
    aten.linear.default: _linear,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.addmm.default: _addmm,
    aten.einsum.default: _einsum,
    aten.baddbmm.default: _addmm,
    aten.mv.default: _matmul,
    aten.bilinear.default: _bilinear,
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
                     aten.conv2d.padding, aten.conv3d.padding), _convolution),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
                    _transposed_convolution),
    aten.scaled_dot_product_attention.default: _attention,
    LINEAR_CROSS_ENTROPY: _linear_cross_entropy,
}
_BACKWARD_FLOP = 2.0
_BACKWARD_FLOP_ATTENTION = 2.5
_BACKWARD_BYTES = 2.0
DTYPES: dict[torch.dtype, Dtype] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, slots=True)
class Beside:
    """What an op does in its forward beside its products, its operands and its results: bytes it moves after one
    another with them, further launches, bytes it keeps for the backward and bytes it works in."""

    moved: float = 0.0
    launches: int = 0
    kept: float = 0.0
    room: float = 0.0


_CHUNK_LAUNCHES = 5


def in_chunks(rows: int, width: int, classes: int, each: int) -> Beside:
    """A head in chunks of rows, of elements of `each` bytes: each chunk's logits are read and written once, and so is
    the sum of the weight's gradient but for the first time; gradients are kept."""
    at_once = rows_at_once(rows, width, classes)
    count = -(-rows // at_once)
    return Beside(each * (2.0 * rows * classes + 2.0 * (count - 1) * classes * width), _CHUNK_LAUNCHES * count,
                  each * float(rows + classes) * width, each * float(at_once) * classes)


def _in_chunks(node: fx.Node, operands: list[Shape]) -> Beside:
    hidden = value_of(node.args[0])
    assert hidden is not None
    return in_chunks(*operands[0], operands[2][0], hidden.dtype.itemsize)  # type: ignore[call-arg]


BESIDE: dict[Any, Callable[[fx.Node, list[Shape]], Beside]] = {LINEAR_CROSS_ENTROPY: _in_chunks}


@dataclass(frozen=True, slots=True)
class Work:
    """What one op does on one device: FLOP, bytes read and written once, the dtype it computes in, and what else."""

    flop: float
    nbytes: float
    dtype: torch.dtype
    backward_flop: float
    beside: Beside = Beside()

    def forward_seconds(self, device: Device) -> float:
        """Seconds of the forward."""
        beside = self.beside.moved / device.memory_bytes_per_s + self.beside.launches * device.launch_s
        return _roofline(self.flop, self.nbytes, self.dtype, device) + beside

    def backward_seconds(self, device: Device) -> float:
        """Seconds of the backward."""
        return _roofline(self.backward_flop, _BACKWARD_BYTES * self.nbytes, self.dtype, device)


def _roofline(flop: float, nbytes: float, dtype: torch.dtype, device: Device) -> float:
    rate = device.matmul_flops(DTYPES.get(dtype, "fp32"))
    return max(flop / rate, nbytes / device.memory_bytes_per_s) + device.launch_s


def work_of(node: fx.Node, operands: list[Shape], result: Shape, nbytes: float, dtype: torch.dtype) -> Work:
    """The work of an op named after `node`, whose operands and result have these local shapes."""
    flop = FLOP[node.target](node, operands, result) if node.target in FLOP else 0.0
    attention = node.target is aten.scaled_dot_product_attention.default
    beside = BESIDE[node.target](node, operands) if node.target in BESIDE else Beside()
    return Work(flop, nbytes, dtype, flop * (_BACKWARD_FLOP_ATTENTION if attention else _BACKWARD_FLOP), beside)


def slowest(devices: Sequence[Device]) -> Device:
    """A device with the worst figure of all `devices` in each respect; the device itself where they are alike."""
    kinds = list(dict.fromkeys(devices))
    if len(kinds) == 1:
        return kinds[0]
    peak = Flops(*(min(device.matmul_flops(dtype) for device in kinds) for dtype in DTYPES.values()))
    return Device("slowest of " + ", ".join(dict.fromkeys(device.kind for device in kinds)), peak, 1.0,
                  min(device.memory_bytes for device in kinds), min(device.memory_bytes_per_s for device in kinds),
                  max(device.launch_s for device in kinds))


@dataclass(frozen=True, slots=True)
class Optimizer:
    """Bytes of fp32 state an element holds, and bytes its step reads and writes an element."""

    state_bytes: float
    step_bytes: float


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(8.0, 28.0), "adam": Optimizer(8.0, 28.0), "sgd": Optimizer(0.0, 12.0),
    "momentum": Optimizer(4.0, 20.0),
}
MASTER_BYTES = 4.0
"""Parameters and gradients rest in fp32, or in the compute dtype where that is all there is."""


def optimizer_called(name: str) -> Optimizer:
    """The optimizer called `name`. Raises UnknownName for others."""
    if name not in OPTIMIZERS:
        raise UnknownName("optimizer", name, list(OPTIMIZERS))
    return OPTIMIZERS[name]
