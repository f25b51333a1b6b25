"""Layouts by hand: what is read, and what is refused with values and remedy."""

from __future__ import annotations

import pytest

from autopar.core.errors import AutoparError
from autopar.core.ranks import HandLayout, Lists


@pytest.mark.parametrize("groups", [(), ((0, 2), (1, 3)), ((3, 1), (0, 2))])
def test_a_good_layout_is_read(groups: Lists) -> None:
    assert HandLayout(((0, 1), (2, 3)), groups).devices(4) == (0, 2, 1, 3)


@pytest.mark.parametrize(("columns", "groups", "said"), [
    (((0, 1), (2, 2)), ((0, 2), (1, 2)), r"ppranks miss ranks \[3\] and repeat \[2\], of 0 to 3; name each once"),
    (((0, 1), (2, 4)), (), r"ppranks miss ranks \[3\] and repeat none and name \[4\], of 0 to 3"),
    (((0, 1), (2, 3)), ((0, 3), (1, 2)), r"dpranks \[0, 3\] are no ranks of one stage .* \[0, 2\], \[1, 3\]; .*orth"),
    (((0, 1, 2, 3),), ((0, 1), (2, 3)), r"dpranks \[0, 1\] are no ranks of one stage"),
    (((0, 1), (2, 3)), ((0, 1, 2), (3,)), r"dpranks have lists of \[1, 3\] ranks; make them equally long"),
    (((0, 1), (2,), (3,)), (), r"ppranks have lists of \[1, 2\] ranks"),
])
def test_bad_layouts_are_refused(columns: Lists, groups: Lists, said: str) -> None:
    with pytest.raises(AutoparError, match=said):
        HandLayout(columns, groups).devices(4)
