"""Bytes of a device that are no values of the program: a GPU's context with the code of kernels, what matrix products
work in, and buffers of communication.

Context and communication are assumed, not measured: what a driver or a library takes is told by nobody beforehand. The
rows of `benchmarks/prediction.py` have what it was, the difference of a device's bytes and those the allocator
reserves. What products work in, the allocator has: 32 MiB on Hopper by torch's default, seen as the difference of a
step's peak on an H100 and its values.
"""

from __future__ import annotations

from autopar.codegen.retained import fuses
from autopar.passes.problem import Setting

CONTEXT_BYTES = 0.55 * 2**30
WORK_BYTES = 32 * 2**20
GROUP_BYTES = 0.35 * 2**30
"""Of the groups of ranks that communicate, where there are any."""


def surrounding_bytes(setting: Setting) -> float:
    """What a rank's process takes of its device beside tensors. Nothing of the kind is told apart on CPUs."""
    if not fuses(setting):
        return 0.0
    return CONTEXT_BYTES + WORK_BYTES + GROUP_BYTES * (setting.mesh.size > 1 or setting.stages > 1)
