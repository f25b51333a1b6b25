"""How many rows of logits are worked on at once, where there are never all of them."""

from __future__ import annotations

CHUNKS = 8
"""The fewer, the less often the weight's gradient is read and written; the more, the less of the logits there is."""
LEAST_ELEMENTS = 2**25
"""A chunk of logits has no fewer elements, 64 MiB in 16 bits: few classes go in fewer chunks."""
_ALIGNED = 128


def rows_at_once(rows: int, classes: int) -> int:
    """The rows of a chunk: a `CHUNKS`th, or more where classes are few."""
    least = max(-(-rows // CHUNKS), LEAST_ELEMENTS // classes, 1)
    return max(1, min(rows, -(-least // _ALIGNED) * _ALIGNED))
