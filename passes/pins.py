"""Ops fixed to strategies by the texts that plans print."""

from __future__ import annotations

import difflib

from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh
from autopar.passes.decision import Context
from autopar.passes.modes import Mode
from autopar.passes.notation import op_called, strategy_text
from autopar.passes.ops import Op
from autopar.passes.strategies import Assignment, assignments

Pins = tuple[tuple[str, str], ...]
"""The name of an op and the text of its strategy, as in (("h_0_attn_c_attn", "S0S1 = S0R X RS1"),)."""
_TOLD = 4


class PinRefused(AutoparError):
    """A pin that no choice of its op on a mesh agrees with."""


def allowed(context: Context, mesh: Mesh, mode: Mode, pins: Pins) -> dict[str, tuple[Assignment, ...]]:
    """The assignments that pins leave, by the name of the op that stands for its equals.

    Equal layers are decided alike, so a pin of one is a pin of all. Raises AutoparError for unknown ops, PinRefused
    for texts that no assignment on this mesh has, alone or together with an earlier pin.
    """
    found: dict[str, tuple[Assignment, ...]] = {}
    for name, text in pins:
        op = _representative(context, op_called(context, name))
        through = any(result.node in context.gradients for result in op.results)
        choices = found.get(op.name) or tuple(assignments(op, mesh, mode, through))
        texts = {choice: strategy_text(context, op, choice) for choice in choices}
        found[op.name] = tuple(choice for choice in choices if _plain(texts[choice]) == _plain(text))
        if not found[op.name]:
            raise PinRefused(f"op {name} can't be pinned to {text!r} in mode {mode.name}; it can be "
                             f"{_some(text, list(dict.fromkeys(texts.values())))}")
    return found


def _representative(context: Context, index: int) -> Op:
    segment = next(s for s in context.segmented.segments if index in s.ops)
    first = context.segmented.representatives[segment.class_id]
    return context.segmented.ops[first.ops[index - segment.first]]


def _plain(text: str) -> str:
    return "".join(text.split()).upper()


def _some(text: str, known: list[str]) -> str:
    """Those of `known` that are most like `text`, and how many there are."""
    near = difflib.get_close_matches(text, known, _TOLD, 0.0)
    more = f" and {len(known) - len(near)} more" if len(known) > len(near) else ""
    return f"{'; '.join(map(repr, near))}{more}"
