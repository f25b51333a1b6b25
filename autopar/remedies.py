"""The smallest changes by which a step would fit into a budget that is too small, by arithmetic.

What rests is cut over more devices where the mode shards it, and what goes with the samples is in proportion to them:

    bytes with b of B samples on n · k devices ≈ around + rest / (k where it is sharded, else 1) + step · b / B / k
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autopar.core.errors import Parts

SHARDED = ("auto", "zero2", "zero3", "zero+1d", "1d", "sequence", "2d", "2.5d", "3d")
"""Modes in which each device rests with less the more there are; of the others the optimizer's at most."""
MOST_DEVICES = 1024
ROOM = 0.97
"""The part of the budget that a change should come to, as these are rough figures."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for: bytes a device, samples of the whole batch, devices, mode and precision."""

    budget: float
    batch: int
    devices: int
    mode: str
    precision: str


def remedies(needed: float, parts: Parts, asked: Asked) -> str:
    """The changes that would do, the smallest first, in words."""
    found = sorted(_changes(parts, asked), key=lambda change: change[0])
    words = [f"raise the budget to {needed:.0f} bytes", *(text for _, text in found)]
    return f"{', or '.join(words)}" if found else f"{words[0]}; a smaller batch alone is not enough"


def _changes(parts: Parts, asked: Asked) -> Iterator[tuple[float, str]]:
    """By how much each change is one, and what it is."""
    room = ROOM * asked.budget - parts.around
    if asked.mode not in SHARDED and asked.devices > 1 and parts.rest / asked.devices + parts.step <= room:
        yield 1.0, f"use mode auto in the place of {asked.mode}"
    if asked.precision == "fp32" and parts.rest + parts.step / 2 <= room:
        yield 1.5, "use precision bf16-mixed"
    batch = int(asked.batch * (room - parts.rest) / (parts.step or 1.0))
    batch -= batch % asked.devices if batch >= asked.devices else 0
    if 0 < batch < asked.batch:
        yield asked.batch / batch, f"use a batch of about {batch} in the place of {asked.batch}"
    k = 2
    while k * asked.devices <= MOST_DEVICES:
        rest = parts.rest / k if asked.mode in SHARDED else parts.rest
        if rest + parts.step / k <= room and asked.batch % (k * asked.devices) == 0:
            yield float(k), f"use about {k * asked.devices} devices in the place of {asked.devices}"
            return
        k *= 2
