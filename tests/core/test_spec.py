"""Specs: the notation and the per-axis view are two faces of the same value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.core.errors import AutoparError
from autopar.core.spec import Spec, State, from_states, parse

Case = tuple[tuple[State, ...], int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """The states of 0 to 10 axes, and a rank they fit."""
    rank = draw(st.integers(0, 5))
    states = st.sampled_from([*range(rank), "R", "P", "G"])
    return tuple(draw(st.lists(states, max_size=10))), rank


@given(cases())
def test_text_reads_back(case: Case) -> None:
    spec = from_states(*case)
    assert parse(str(spec)) == spec


@given(cases())
def test_states_read_back(case: Case) -> None:
    states, rank = case
    spec = from_states(states, rank)
    assert spec.states(len(states)) == states
    assert len(spec.dims) == rank
    assert spec.axes == tuple(axis for axis, state in enumerate(states) if isinstance(state, int))


@pytest.mark.parametrize(("text", "spec"), [
    ("", Spec(())),
    ("R", Spec(((),))),
    ("S01R", Spec(((0, 1), ()))),
    ("RS2S0", Spec(((), (2,), (0,)))),
    ("RR(P1)", Spec(((), ()), (1,))),
    ("S0R(P1)(G23)", Spec(((0,), ()), (1,), (2, 3))),
])
def test_notation(text: str, spec: Spec) -> None:
    assert parse(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize("text", [
    "S", "X", "r", "s0", "S0 R", "RS", "S0R\n", " R", "S\N{ARABIC-INDIC DIGIT THREE}",
    "R(P)", "R(G0)(P1)", "(P0)R", "R(P0", "R(Q0)",
    "S00R", "S0S0", "S0R(P0)", "R(P1)(G1)", "S10R", "RR(P10)",
])
def test_bad_text_is_refused(text: str) -> None:
    with pytest.raises(AutoparError, match="spec"):
        parse(text)


@pytest.mark.parametrize(("dims", "partial"), [(((0,), (0,)), ()), (((0,),), (0,)), (((10,),), ()), (((-1,),), ())])
def test_bad_axes_are_refused(dims: tuple[tuple[int, ...], ...], partial: tuple[int, ...]) -> None:
    with pytest.raises(AutoparError, match="every mesh axis"):
        Spec(dims, partial)
