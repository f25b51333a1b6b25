"""The ops of a plan, a line each, with how their parameters rest; layers in a row that are decided alike print once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.planned import PlannedOp, PlannedParameter


@dataclass(frozen=True, slots=True)
class Row:
    """An op by its name within its segment: what is decided of it, and how the parameters of its module rest."""

    name: str
    strategy: str
    assignment: tuple[str, ...]
    at_rest: str


@dataclass(frozen=True, slots=True)
class Section:
    """The rows of one segment, and the names of their ops in full."""

    name: str
    rows: tuple[Row, ...]
    full: tuple[str, ...]


def listing(ops: Sequence[PlannedOp], parameters: Sequence[PlannedParameter]) -> str:
    """One line an op, such as `fc  S0S1 = S0R X RS1  weight S1R (Z1) at rest`: parameters are told where they rest cut.

    Those whose module is not an op of its own follow in their own lines. Segments in a row that differ in nothing but
    the number of their layer are printed once, under a line that counts them.
    """
    shown = [op for op in ops if op.strategy]
    cut = [p for p in parameters if set(p.spec) != {"R"} and p.spec]
    names = {op.name for op in shown}
    sections = [_section(name, list(run), cut) for name, run in itertools.groupby(shown, lambda op: op.segment)]
    name_width = max(map(len, names), default=0)
    strategy_width = max((len(op.strategy) for op in shown), default=0)
    lines: list[str] = []
    for _, run in itertools.groupby(sections, lambda section: section.rows):
        first, *others = run
        if others:
            lines.append(f"{first.name} to {others[-1].name}, {len(others) + 1} layers alike:")
        lines += [f"{name:<{name_width}}  {row.strategy:<{strategy_width}}  {row.at_rest}".rstrip()
                  for name, row in zip(first.full, first.rows, strict=True)]
    alone = [p for p in cut if _module(p) not in names]
    return "\n".join([*lines, *(f"{p.name}  {_spec(p)} at rest" for p in alone)])


def _section(name: str, ops: Sequence[PlannedOp], cut: Sequence[PlannedParameter]) -> Section:
    own = {op.name: [p for p in cut if _module(p) == op.name] for op in ops}
    rows = (Row(op.name.removeprefix(f"{name}_"), op.strategy, op.assignment, _at_rest(own[op.name])) for op in ops)
    return Section(name, tuple(rows), tuple(op.name for op in ops))


def _module(parameter: PlannedParameter) -> str:
    """The name that an op of the parameter's module has."""
    return parameter.name.rpartition(".")[0].replace(".", "_")


def _at_rest(parameters: Sequence[PlannedParameter]) -> str:
    """How the parameters of a module rest, matrices before vectors, those that rest alike together."""
    alike: dict[str, list[str]] = {}
    for parameter in sorted(parameters, key=lambda p: -sum(letter in "SR" for letter in p.spec)):
        alike.setdefault(_spec(parameter), []).append(parameter.name.rpartition(".")[2])
    said = (f"{' and '.join(names)} {spec}" for spec, names in alike.items())
    return f"{', '.join(said)} at rest" if alike else ""


def _spec(parameter: PlannedParameter) -> str:
    """The spec at rest; then, as edges print it, `(Z0)` where it is gathered over axis 0 for each use, `(K0)` where it
    is gathered once and kept until the backward."""
    return " ".join(filter(None, (parameter.spec, gathered(parameter.storage))))


def gathered(storage: str) -> str:
    """`(Z0)` or `(K0)` of a storage as plans write it, nothing where no axis is gathered."""
    states = storage.split(",")
    return "".join(f"({state}{''.join(str(a) for a, s in enumerate(states) if s == state)})" for state in "ZK"
                   if state in states)
