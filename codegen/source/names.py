"""Names that read well: each once in its scope, none that Python or a written program has for something else."""

from __future__ import annotations

import builtins
import itertools
import keyword
import re
from dataclasses import dataclass, field

TAKEN = {*keyword.kwlist, *dir(builtins), "aten", "torch", "rank", "seed", "state", "batch", "self"}


def word(text: str) -> str:
    """`text` as a name."""
    found = re.sub(r"\W+", "_", text).strip("_") or "x"
    return f"x_{found}" if found[0].isdigit() else found


@dataclass(slots=True)
class Scope:
    """The names in use."""

    used: set[str] = field(default_factory=lambda: set(TAKEN))

    def new(self, wish: str) -> str:
        """`wish`, numbered where it is in use."""
        name = word(wish)
        stem = re.sub(r"_\d+$", "", name) if name in self.used else name
        numbered = (f"{stem}_{i}" for i in itertools.count(1))
        free = name if name not in self.used else next(n for n in numbered if n not in self.used)
        self.used.add(free)
        return free
