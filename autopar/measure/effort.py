"""How large, how often and how long to try: the one table to change where measuring takes too long or says too little.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.core.device import Dtype

KIB, MIB = 2**10, 2**20
FEWEST_SIZES = 3
"""Sizes that are tried however long they take: fewer tell nothing of a line."""


@dataclass(frozen=True, slots=True)
class Effort:
    """Bytes of the larger local tensor of collectives and of messages; a batch of calls lasts about `batch_s` and is
    repeated; a size is left out where a call would last longer than `longest_s`. `matmuls` are (m, k, n) by dtype,
    `copy_bytes` what is copied to tell the bandwidth of memory."""

    group_bytes: tuple[int, ...]
    pair_bytes: tuple[int, ...]
    batch_s: float
    repeats: int
    longest_s: float
    matmuls: dict[Dtype, tuple[tuple[int, int, int], ...]]
    copy_bytes: int


_LARGE = ((8192, 8192, 8192), (8192, 1536, 6144), (16384, 4096, 4096))
_SMALL = ((512, 512, 512), (1024, 256, 1024))
EFFORTS: dict[str, Effort] = {
    "nccl": Effort((KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB,
                    512 * MIB), (KIB, MIB, 64 * MIB, 256 * MIB), 0.01, 3, 0.6,
                   {"fp32": _LARGE, "bf16": _LARGE, "fp16": _LARGE}, 1024 * MIB),
    "gloo": Effort((KIB, 16 * KIB, 128 * KIB, MIB, 4 * MIB, 16 * MIB),
                   (KIB, 256 * KIB, 2 * MIB, 8 * MIB), 0.01, 4, 0.25,
                   {"fp32": _SMALL, "bf16": _SMALL, "fp16": ((128, 128, 128), (256, 64, 128))}, 32 * MIB),
}
