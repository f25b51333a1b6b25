"""Amounts of memory as people write them."""

from __future__ import annotations

import math
import re

from autopar.core.errors import AutoparError

BYTES: dict[str, int] = {"": 1, "B": 1, "KB": 10**3, "KiB": 2**10, "MB": 10**6, "MiB": 2**20, "GB": 10**9,
                         "GiB": 2**30, "TB": 10**12, "TiB": 2**40}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?) *([a-z]*)", re.IGNORECASE)
_FACTORS = {unit.lower(): factor for unit, factor in BYTES.items()}


def parse_bytes(text: str) -> float:
    """Bytes in `20GiB`, `80 GB`, `512MiB`, `900MB` or a plain number of bytes. Raises AutoparError for others."""
    found = _AMOUNT.fullmatch(text.strip())
    factor = _FACTORS.get(found[2].lower()) if found else None
    amount = float(found[1]) * factor if found and factor else 0.0
    if not 0.0 < amount < math.inf:
        raise AutoparError(f"memory {text!r} is not of the form 20GiB: a number above 0, then TiB, GiB, MiB, KiB, "
                           "TB, GB, MB, KB or nothing for bytes")
    return amount
