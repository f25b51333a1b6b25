"""Comparisons that no drawn number decides, so that a model can branch on them while it is traced.

Layer dropout is written as `if torch.rand([]) < rate: continue`. At a rate of 0 no layer is ever left out, but a tracer
that does not look at values cannot know: numbers that `torch.rand` draws are at least 0 and below 1.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BELOW = {torch.Tensor.__lt__, torch.Tensor.lt, torch.lt, operator.lt}
_LEAST = {torch.Tensor.__ge__, torch.Tensor.ge, torch.ge, operator.ge}
_COMPARISONS = _BELOW | _LEAST


class CertainComparisons(TorchFunctionMode):
    """Answers `drawn < bound` and `drawn >= bound` for one drawn number where `bound` is at most 0 or at least 1."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn: dict[int, Tensor] = {}

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if function in _COMPARISONS and len(args) == 2 and id(args[0]) in self._drawn:
            bound = args[1]
            if isinstance(bound, (int, float)) and not 0.0 < bound < 1.0:
                return torch.tensor((bound >= 1.0) == (function in _BELOW))
        made = function(*args, **(kwargs or {}))
        if function is torch.rand and made.ndim == 0:
            self._drawn[id(made)] = made
        return made
