"""An effort that takes next to no time."""

from __future__ import annotations

from unittest import mock

from autopar.measure.effort import EFFORTS, KIB, Effort

QUICK = Effort((KIB, 64 * KIB, 256 * KIB), (KIB, 64 * KIB, 256 * KIB), 1e-3, 3, 0.05,
               {"fp32": ((64, 64, 64),), "bf16": ((32, 32, 32),), "fp16": ((16, 16, 16),)}, 256 * KIB)


def quick() -> mock._patch_dict:
    """A context in which measuring over gloo makes that effort."""
    return mock.patch.dict(EFFORTS, {"gloo": QUICK})
