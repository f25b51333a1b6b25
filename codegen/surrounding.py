"""Bytes of a device that are no tensors': a GPU's context with the code of kernels, and buffers of communication.

Rough figures, from processes of torch 2.11 with CUDA 13 and NCCL on H100s; what a driver or a library takes is told by
nobody beforehand. `benchmarks/prediction.py` prints what it was beside what the allocator holds.
"""

from __future__ import annotations

from autopar.codegen.retained import fuses
from autopar.passes.decision import Decision
from autopar.passes.problem import Setting

CONTEXT_BYTES = 0.55 * 2**30
GROUP_BYTES = 0.35 * 2**30
"""Of each group of ranks that communicates, over one axis or several."""


def surrounding_bytes(decision: Decision, setting: Setting) -> float:
    """What a rank's process takes of its device beside tensors. Nothing of the kind is told apart on CPUs."""
    if not fuses(setting):
        return 0.0
    wide = [axis for axis in decision.mesh.axes if decision.mesh.extent((axis,)) > 1]
    return CONTEXT_BYTES + GROUP_BYTES * (len(wide) + (len(wide) > 1))
