"""A minimisation model of named variables and linear rows, solved by CBC or HiGHS; nothing else imports PuLP.

The linear relaxation is solved first, and the integer model only when that leaves a choice fractional.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import pulp

from autopar.core.errors import AutoparError, UnknownName

Status = Literal["optimal", "feasible", "infeasible", "unsolved"]
TOLERANCE = 1e-9
"""How far rows may be missed and choices be from whole numbers."""
SOLVERS = ("cbc", "highs")


class Variable(Protocol):
    """A variable of a model; PuLP's names for its kind and its value in the last solution, None when in no row."""

    name: str
    cat: str
    varValue: float | None


Terms = Iterable[tuple[Variable, float]]
"""A sum of coefficient · variable; a variable may occur several times."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the solver found: `values` by name, their `objective`, and a proven lower `bound` of any objective.

    The status is "optimal", or "feasible" when the time limit came first, "unsolved" when it came before any
    values; without values `objective` is infinite.
    """

    status: Status
    objective: float
    bound: float
    values: Mapping[str, float]
    solve_seconds: float


class Model:
    """A minimisation model under construction: add variables, then rows, set the objective, solve.

    `unit` is what 1 in the objective stands for: outcomes are in seconds when it is the seconds of that 1.
    """

    __slots__ = ("_make", "_objective", "_problem", "unit", "variables")

    def __init__(self, name: str, unit: float = 1.0) -> None:
        self.unit = unit
        self._problem = pulp.LpProblem(name, pulp.LpMinimize)
        self._make = getattr(self._problem, "add_variable", pulp.LpVariable)  # PuLP 4 keeps only the first
        self._objective: dict[Variable, float] = {}
        self.variables: dict[str, Variable] = {}

    def __str__(self) -> str:
        return f"{self._problem.name}: {len(self.variables)} variables, {self._problem.numConstraints()} rows"

    def choice(self, name: str) -> Variable:
        """A new variable that is 0 or 1."""
        return self._add(name, 1, pulp.LpInteger)

    def whole(self, name: str, most: float) -> Variable:
        """A new variable that is a whole number from 0 to `most`."""
        return self._add(name, most, pulp.LpInteger)

    def amount(self, name: str, most: float | None = None) -> Variable:
        """A new variable of at least 0, and no more than `most` where that is given."""
        return self._add(name, most, pulp.LpContinuous)

    def equal(self, terms: Terms, value: float) -> None:
        """Require that `terms` come to `value`."""
        self._require(terms, pulp.LpConstraintEQ, value)

    def at_most(self, terms: Terms, value: float) -> None:
        """Require that `terms` come to no more than `value`."""
        self._require(terms, pulp.LpConstraintLE, value)

    def at_least(self, terms: Terms, value: float) -> None:
        """Require that `terms` come to no less than `value`."""
        self._require(terms, pulp.LpConstraintGE, value)

    def minimise(self, terms: Terms) -> None:
        """Set the objective."""
        self._objective = _sum(terms)
        self._problem.setObjective(pulp.LpAffineExpression(self._objective))

    def solve(self, solver: str = "cbc", limit_s: float | None = None) -> Outcome:
        """The best values, by "cbc" or "highs", within `limit_s` seconds. Raises UnknownName, AutoparError."""
        start = time.perf_counter()
        relaxed = self._run(_solver(solver, False, limit_s))
        if relaxed == "infeasible":
            return self._outcome("infeasible", start, float("inf"))
        bound = self._value() if relaxed == "optimal" else float("-inf")
        if relaxed == "optimal" and self._integral():
            return self._outcome("optimal", start, bound)
        left = None if limit_s is None else max(0.1, limit_s - (time.perf_counter() - start))
        status = self._run(_solver(solver, True, left))
        status = "unsolved" if status == "feasible" and not self._integral() else status
        return self._outcome(status, start, self._value() if status == "optimal" else bound)

    def _add(self, name: str, most: float | None, category: str) -> Variable:
        assert name not in self.variables, f"two variables named {name}"
        self.variables[name] = self._make(name, 0, most, category)
        return self.variables[name]

    def _require(self, terms: Terms, sense: int, value: float) -> None:
        expression = pulp.LpAffineExpression(_sum(terms))
        self._problem.addConstraint(pulp.LpConstraint(expression, sense, rhs=value))

    def _run(self, solver: Any) -> Status:
        try:
            self._problem.solve(solver)
        except pulp.PulpSolverError as error:
            raise AutoparError(f"the solver failed on {self}: {error}; choose the other one of {SOLVERS}") from error
        if self._problem.status == pulp.LpStatusInfeasible:
            return "infeasible"
        assert self._problem.status != pulp.LpStatusUnbounded, f"{self} is unbounded"
        found: dict[int, Status] = {pulp.LpSolutionOptimal: "optimal", pulp.LpSolutionIntegerFeasible: "feasible"}
        return found.get(self._problem.sol_status, "unsolved")

    def _outcome(self, status: Status, start: float, bound: float) -> Outcome:
        solved = status in ("optimal", "feasible")
        values = {name: _level(variable) for name, variable in self.variables.items()} if solved else {}
        objective = self._value() if solved else float("inf")
        return Outcome(status, objective, bound, values, time.perf_counter() - start)

    def _value(self) -> float:
        return self.unit * sum(coefficient * _level(variable) for variable, coefficient in self._objective.items())

    def _integral(self) -> bool:
        whole = (v for v in self.variables.values() if v.cat == pulp.LpInteger)
        return all(abs(_level(v) - round(_level(v))) <= TOLERANCE for v in whole)


def _level(variable: Variable) -> float:
    return variable.varValue or 0.0


def _sum(terms: Terms) -> dict[Variable, float]:
    total: dict[Variable, float] = {}
    for variable, coefficient in terms:
        total[variable] = total.get(variable, 0.0) + coefficient
    return total


def _solver(name: str, integer: bool, limit_s: float | None) -> Any:
    """PuLP's solver object, exact: no gap is accepted. The one place that knows which PuLP has which solvers."""
    if name not in SOLVERS:
        raise UnknownName("solver", name, list(SOLVERS))
    common = {"mip": integer, "msg": False, "timeLimit": limit_s, "gapRel": 0.0, "gapAbs": 0.0}
    solver = _cbc(common) if name == "cbc" else _highs(common)
    if not solver.available():
        package = "highspy" if name == "highs" else "pulp[cbc]"
        raise AutoparError(f"solver {name!r} is not installed; `pip install {package}`, or choose the other solver")
    return solver


def _cbc(options: dict[str, Any]) -> Any:
    """Without integer preprocessing, which has been seen to lose the optimum of small models with a memory row, and
    without cuts and heuristics, which take longer than the branching that they save: models come with few choices."""
    bundled = getattr(getattr(pulp, "PULP_CBC_CMD", None), "pulp_cbc_path", None)  # gone in PuLP 4
    exact = [f"primalT {TOLERANCE}", f"integerT {TOLERANCE}", "preprocess off", "cuts off", "heuristics off"]
    return pulp.COIN_CMD(path=bundled, options=exact, **options)


def _highs(options: dict[str, Any]) -> Any:
    return pulp.HiGHS(primal_feasibility_tolerance=TOLERANCE, mip_feasibility_tolerance=TOLERANCE, **options)
