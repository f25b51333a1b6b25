"""What ranks make of what they bring: who has the same samples, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.codegen.offers import UNKNOWN, Habits, Offer, axes_of_offers, check_modes
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh

MESH = Mesh((2, 2))
WHOLE, CUT, ALL = (), (0,), (0, 1)
WAYS = (WHOLE, CUT, ALL)


def offers(*brought: tuple[int, int]) -> list[Offer]:
    """Of (samples, data) by rank."""
    return [Offer(1, 1, rows, 5, data) for rows, data in brought]


@pytest.mark.parametrize(("brought", "settled", "axes"), [
    ([(8, 1)] * 4, None, WHOLE), ([(4, 1), (4, 1), (4, 2), (4, 2)], None, CUT),
    ([(2, 1), (2, 2), (2, 3), (2, 4)], None, ALL), ([(3, 1)] * 4, None, WHOLE),
    ([(3, 1), (3, 1), (1, 2), (1, 2)], None, CUT), ([(1, 1), (2, 2), (2, 3), (1, 4)], None, ALL),
    ([(4, 1)] * 4, WHOLE, WHOLE), ([(1, UNKNOWN)] * 4, ALL, ALL), ([(2, UNKNOWN)] * 4, None, ALL),
    ([(8, 1)] * 4, ALL, WHOLE), ([(2, 1)] * 4, WHOLE, WHOLE), ([(2, 1), (2, 2), (2, 3), (2, 4)], WHOLE, ALL),
    ([(1, 1), (1, 1), (2, 2), (2, 2)], CUT, CUT),
])
def test_along_which_axes_samples_differ(brought: Any, settled: Any, axes: Any) -> None:
    assert axes_of_offers(offers(*brought), 8, WAYS, Habits(settled), MESH) == axes


@pytest.mark.parametrize(("brought", "settled", "axes"), [
    ([(8, 1), (8, 2), (8, 3), (8, 4)], None, ALL), ([(4, 1), (4, 2), (4, 3), (4, 4)], None, ALL),
    ([(4, 1), (4, 2), (4, 3), (4, 4)], CUT, ALL), ([(8, 1), (8, 1), (8, 2), (8, 2)], None, CUT),
    ([(4, UNKNOWN)] * 4, ALL, ALL), ([(4, UNKNOWN)] * 4, None, CUT),
])
def test_local_parts_are_parts_whatever_their_size(brought: Any, settled: Any, axes: Any) -> None:
    assert axes_of_offers(offers(*brought), 8, (CUT, ALL), Habits(settled), MESH) == axes


def test_what_is_not_read_is_as_it_was_before() -> None:
    habits, unread = Habits(), [(8, UNKNOWN)] * 4
    read = offers(*[(8, 1)] * 4), offers((2, 1), (2, 2), (2, 3), (2, 4))
    calls = [*read, offers(*unread), offers(*[(2, UNKNOWN)] * 4)]
    assert [axes_of_offers(call, 8, WAYS, habits, MESH) for call in calls] == [WHOLE, ALL, WHOLE, ALL]


@pytest.mark.parametrize(("brought", "ways", "said"), [
    ([(8, 1), (8, 1), (8, 1), (8, 2)], WAYS, "data differ"), ([(8, 1)] * 3 + [(2, 1)], (WHOLE,), "different kinds"),
    ([(4, 1), (4, 2), (4, 3), (4, 4)], (CUT,), "ranks that need the same samples"),
    ([(UNKNOWN, 1)] * 4, WAYS, "different kinds"),
])
def test_what_does_not_go_together(brought: Any, ways: Any, said: str) -> None:
    with pytest.raises(AutoparError, match=said):
        axes_of_offers(offers(*brought), 8, ways, Habits(), MESH)


def test_uneven_ones_where_all_were_whole() -> None:
    with pytest.raises(AutoparError, match="different kinds"):
        axes_of_offers(offers((8, 1), (8, 1), (8, 1), (4, 2)), 8, WAYS, Habits(WHOLE), MESH)


@pytest.mark.parametrize("other", [Offer(0, 1, 8, 5, 1), Offer(1, 0, 8, 5, 1), Offer(1, 1, 8, 6, 1)])
def test_calls_that_differ(other: Offer) -> None:
    """In arguments that do not fit, in training or evaluating, in the other sizes."""
    with pytest.raises(AutoparError, match="different kinds"):
        axes_of_offers([*offers(*[(8, 1)] * 3), other], 8, WAYS, Habits(), MESH)


def test_ranks_that_train_are_told_from_others() -> None:
    check_modes([Offer(1, training, 8, 5) for training in (1, 1)])
    with pytest.raises(AutoparError, match=r"1 of 3 ranks train \(0\) and the others evaluate"):
        check_modes([Offer(1, training, 8, 5) for training in (1, 0, 0)])
