"""Factor notation: what each dim of each operand and result of an op is called.

    linear   "... k, n k, +n -> ... n"

Operands before the arrow, results after it, one letter a dim. A letter in operands and results passes through
when sharded; one in operands alone is summed over, and leaves the result a partial sum. `1` is a dim of size
one, `...` any number of dims, `*` an operand that is passed whole. `+` marks an operand that is added to the
sum once, a bias: it must be zero on all parts but one when a summed letter is sharded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_UNIT = "1"


@dataclass(frozen=True, slots=True)
class Operand:
    """The letters of one operand, None where it is passed whole."""

    letters: tuple[str, ...] | None
    additive: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """An op's sharding behaviour. Letters of `whole` are never sharded, those of `special` only with a substitute."""

    notation: str
    whole: frozenset[str] = field(default_factory=frozenset)
    special: frozenset[str] = field(default_factory=frozenset)

    def bind(self, ranks: tuple[int, ...],
             result_ranks: tuple[int, ...]) -> tuple[list[Operand], list[tuple[str, ...]]]:
        """The letters for operands of these ranks; operands the call left out are dropped from the end."""
        left, right = (side.strip() for side in self.notation.split("->"))
        operands = [_operand(text, rank) for text, rank in zip(left.split(","), ranks, strict=False)]
        results = [_expand(text.split(), rank) for text, rank in zip(right.split(","), result_ranks, strict=True)]
        return operands, results


def rule(notation: str, whole: str = "", special: str = "") -> Rule:
    """A Rule with its letters given as one string each, separated by spaces."""
    return Rule(notation, frozenset(whole.split()), frozenset(special.split()))


def _operand(text: str, rank: int) -> Operand:
    text = text.strip()
    if text == "*":
        return Operand(None)
    return Operand(_expand(text.removeprefix("+").split(), rank), text.startswith("+"))


def _expand(tokens: list[str], rank: int) -> tuple[str, ...]:
    """Replace `...` by as many letters e0, e1, … as `rank` asks for."""
    if "..." not in tokens:
        assert len(tokens) == rank, f"{tokens} names {len(tokens)} dims of {rank}"
        return tuple(tokens)
    at = tokens.index("...")
    inner = [f"e{i}" for i in range(rank - len(tokens) + 1)]
    return (*tokens[:at], *inner, *tokens[at + 1:])


def is_unit(letter: str) -> bool:
    """Whether `letter` stands for a dim of size one."""
    return letter == _UNIT


def letters(prefix: str, count: int) -> list[str]:
    """`count` distinct letters starting with `prefix`."""
    assert re.fullmatch(r"[a-z]+", prefix)
    return [f"{prefix}{i}" for i in range(count)]
