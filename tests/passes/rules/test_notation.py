"""Factor notation, bound to operands of some ranks."""

from __future__ import annotations

import pytest

from autopar.passes.rules.notation import Operand, is_unit, letters, rule


@pytest.mark.parametrize(("notation", "ranks", "operands", "result"), [
    ("m k, k n -> m n", (2, 2), ["m k", "k n"], "m n"),
    ("... k, n k, +n -> ... n", (2, 2, 1), ["e0 k", "n k", "+n"], "e0 n"),
    ("... k, n k, +n -> ... n", (4, 2), ["e0 e1 e2 k", "n k"], "e0 e1 e2 n"),
    ("... k, n k, +n -> ... n", (1, 2), ["k", "n k"], "n"),
    ("n c, *, * -> n c", (2, 1, 1), ["n c", "*", "*"], "n c"),
    ("o0 1 o2, 1 -> o0 o1 o2", (3, 1), ["o0 1 o2", "1"], "o0 o1 o2"),
    ("t c, t -> ", (2, 1), ["t c", "t"], ""),
    (" -> o0 o1", (), [], "o0 o1"),
])
def test_bind(notation: str, ranks: tuple[int, ...], operands: list[str], result: str) -> None:
    bound, results = rule(notation).bind(ranks, (len(result.split()),))
    assert [written(operand) for operand in bound] == operands
    assert [" ".join(found) for found in results] == [result]


def written(operand: Operand) -> str:
    if operand.letters is None:
        return "*"
    return ("+" if operand.additive else "") + " ".join(operand.letters)


def test_a_rank_that_does_not_fit_is_our_fault() -> None:
    with pytest.raises(AssertionError, match="names 2 dims of 3"):
        rule("m k, k n -> m n").bind((3, 2), (2,))


def test_letters() -> None:
    assert letters("o", 3) == ["o0", "o1", "o2"]
    assert is_unit("1") and not is_unit("o1")
    found = rule("n c, o c -> n o", whole="n o", special="c")
    assert (found.whole, found.special) == ({"n", "o"}, {"c"})
