"""Lookups whose places are known before anything runs, such as those of positions."""

from __future__ import annotations

import torch

from autopar.core.errors import AutoparError
from autopar.passes.decision import Context

_EMBEDDING = torch.ops.aten.embedding.default


def checked(context: Context) -> Context:
    """The context, if no row is looked up that a table does not have, which nothing sees on `meta`.

    Raises AutoparError.
    """
    program = context.segmented.factored.program
    for node in program.graph.nodes:
        if node.target is _EMBEDDING and node.args[1].name in program.constants:
            places, rows = program.constants[node.args[1].name], node.args[0].meta["val"].shape[0]
            wrong = places[(places < 0) | (places >= rows)]
            if wrong.numel():
                raise AutoparError(f"{node.meta.get('path') or node.name} looks up row {int(wrong[0])}, it has rows 0 "
                                   f"to {rows - 1}: the inputs are longer than the model takes; give shorter ones, or "
                                   "build it for longer ones")
    return context
