"""The model on textbook cases, by both solvers."""

from __future__ import annotations

import pytest

from autopar.core.errors import UnknownName
from autopar.solver.model import SOLVERS, Model


@pytest.mark.parametrize("solver", SOLVERS)
def test_choices_stay_whole_where_the_relaxation_is_not(solver: str) -> None:
    """The relaxation would take one and a half of three items."""
    model = Model("knapsack", unit=0.5)
    taken = [model.choice(f"x{i}") for i in range(3)]
    model.at_most([(x, 2.0) for x in taken], 3.0)
    model.minimise([(x, -1.0) for x in taken])
    outcome = model.solve(solver)
    assert (outcome.status, outcome.objective, outcome.bound) == ("optimal", -0.5, -0.5)
    assert sorted(outcome.values.values()) == [0.0, 0.0, 1.0]
    assert str(model) == "knapsack: 3 variables, 1 rows"


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_of_each_kind(solver: str) -> None:
    """Terms of one variable add up: 3·a = 6, b ≥ a + 1, and c, in no row, is 0."""
    model = Model("rows")
    a, b, c = (model.amount(name) for name in "abc")
    model.equal([(a, 1.0), (a, 2.0)], 6.0)
    model.at_least([(b, 1.0), (a, -1.0)], 1.0)
    model.minimise([(b, 1.0), (c, 1.0)])
    outcome = model.solve(solver)
    assert dict(outcome.values) == pytest.approx({"a": 2.0, "b": 3.0, "c": 0.0})
    assert outcome.objective == pytest.approx(3.0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("most", [0.5, 1.5])
def test_infeasible_relaxed_or_not(solver: str, most: float) -> None:
    """Two equal choices that come to 1: below 0.5 nothing does, below 1.5 only halves do."""
    model = Model("odd")
    x, y = model.choice("x"), model.choice("y")
    model.equal([(x, 1.0), (y, -1.0)], 0.0)
    model.equal([(x, 1.0), (y, 1.0)], 1.0)
    model.at_most([(x, 1.0), (y, 1.0)], most)
    model.minimise([(x, 1.0)])
    outcome = model.solve(solver)
    assert (outcome.status, outcome.objective, dict(outcome.values)) == ("infeasible", float("inf"), {})


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(UnknownName, match="'gurobi'; known: cbc, highs"):
        Model("any").solve("gurobi")
