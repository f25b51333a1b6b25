"""One accelerator: how fast it computes and how much it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from autopar.core.errors import AutoparError, UnknownName
from autopar.core.files import entry

Dtype = Literal["fp32", "bf16", "fp16"]
_FIGURES = ("efficiency", "memory_bytes", "memory_bytes_per_s", "launch_s")


def require_positive(what: str, values: Iterable[float]) -> None:
    """Raises AutoparError unless all `values` are finite and above 0."""
    wrong = next((value for value in values if not (math.isfinite(value) and value > 0)), None)
    if wrong is not None:
        raise AutoparError(f"{what} is {wrong}, needed is a finite number above 0; measure again or correct it")


@dataclass(frozen=True, slots=True)
class Flops:
    """Multiplications and additions a second, by the dtype of a matmul's operands."""

    fp32: float
    bf16: float
    fp16: float

    def __post_init__(self) -> None:
        require_positive("peak FLOP/s", self.table().values())

    def table(self) -> dict[str, float]:
        """FLOP/s by dtype."""
        return {"fp32": self.fp32, "bf16": self.bf16, "fp16": self.fp16}


@dataclass(frozen=True, slots=True)
class Device:
    """`efficiency` is the fraction of `peak` that large matmuls reach; bytes of its memory, and bytes a second it
    reads or writes; `launch_s` the seconds to start one kernel."""

    kind: str
    peak: Flops
    efficiency: float
    memory_bytes: float
    memory_bytes_per_s: float
    launch_s: float

    def __post_init__(self) -> None:
        for name in _FIGURES:
            require_positive(f"{name} of device {self.kind}", [getattr(self, name)])
        if self.efficiency > 1:
            raise AutoparError(f"efficiency of device {self.kind} is {self.efficiency}, needed is a fraction of the "
                               "peak, at most 1; raise the peak instead")

    def matmul_flops(self, dtype: Dtype) -> float:
        """FLOP/s that a large matmul reaches. Raises UnknownName for other dtypes."""
        table = self.peak.table()
        if dtype not in table:
            raise UnknownName("matmul dtype", dtype, list(table))
        return table[dtype] * self.efficiency

    def to_json(self) -> dict[str, Any]:
        """The figures with units in their names."""
        return {"kind": self.kind, "peak_flops_per_s": self.peak.table(), **{n: getattr(self, n) for n in _FIGURES}}


def device_from_json(data: dict[str, Any]) -> Device:
    """The inverse of `Device.to_json`. Raises AutoparError naming what is missing or wrong."""
    peak = entry(data, "peak_flops_per_s", dict)
    flops = Flops(*(entry(peak, dtype, float) for dtype in ("fp32", "bf16", "fp16")))
    return Device(entry(data, "kind", str), flops, *(entry(data, name, float) for name in _FIGURES))
