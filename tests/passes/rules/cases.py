"""Cases of the property test: a call of one op on operands, and the factors that may be sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Operand = Callable[[torch.Generator], Tensor]


def x(*shape: int) -> Operand:
    """A float input."""
    return lambda g: torch.randn(shape, generator=g, dtype=torch.float64)


def w(*shape: int) -> Operand:
    """A parameter."""
    return lambda g: nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64))


def b(*shape: int) -> Operand:
    """A buffer, positive."""
    return lambda g: nn.Buffer(torch.rand(shape, generator=g, dtype=torch.float64) + 0.5)


def i(most: int, *shape: int) -> Operand:
    """Indices below `most`."""
    return lambda g: torch.randint(most, shape, generator=g)


def mask(*shape: int) -> Operand:
    """A boolean mask that lets each query see its first key."""
    return lambda g: (torch.rand(shape, generator=g) < 0.5).index_fill(-1, torch.tensor(0), True)


def targets(rows: int, classes: int) -> Operand:
    """Targets whose first half is ignored but for one, so that shards count unequally, one of them nothing."""
    def make(g: torch.Generator) -> Tensor:
        found = torch.randint(classes, (rows,), generator=g)
        found[1:rows // 2 + 1] = -100
        return found
    return make


@dataclass(frozen=True)
class Case:
    """A call of `op` by `call` on the operands, and the factors that may be sharded."""

    name: str
    factors: str
    op: Any
    call: Callable[..., Tensor]
    operands: tuple[Operand, ...]
    random: bool = False


def case(name: str, factors: str, op: Any, call: Callable[..., Tensor], *operands: Operand,
         random: bool = False) -> Any:
    return pytest.param(Case(name, factors, op, call, operands, random), id=name)
