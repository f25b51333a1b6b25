"""Everything decided for one program on one cluster; saved as JSON, checked without the solver."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from autopar.core.errors import AutoparError
from autopar.core.files import entries, entry, read_object, write_whole

FORMAT = "autopar plan 1"
GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class PlannedOp:
    """One op: what each axis does (a factor of its rule, `R` or `G`) and how it prints, `S0R = S0R X RR`."""

    name: str
    segment: str
    assignment: tuple[str, ...]
    strategy: str


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """One parameter: per axis `R`, `Z` (gathered for use) or the factor it is sharded on; its spec at rest."""

    name: str
    storage: str
    spec: str


@dataclass(frozen=True, slots=True)
class Seconds:
    """A predicted step: the parts add up to `step`."""

    step: float
    compute: float
    inline: float
    exposed: float
    optimizer: float


@dataclass(frozen=True, slots=True)
class Bytes:
    """Predicted bytes of one device, by kind."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    transient: float

    @property
    def total(self) -> float:
        """All kinds together."""
        return float(sum(dataclasses.astuple(self)))


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision with its claims. `gap` is the fraction by which it may miss the optimum of its mode and mesh."""

    model: str
    program_key: str
    cluster: str
    cluster_key: str
    mesh: tuple[int, ...]
    mode: str
    precision: str
    optimizer: str
    status: str
    gap: float
    seconds: Seconds
    memory: Bytes
    ops: tuple[PlannedOp, ...]
    parameters: tuple[PlannedParameter, ...]
    attention: str
    fallback_ops: tuple[str, ...]
    nodes: int
    edges: int
    solve_seconds: float

    def to_json(self) -> dict[str, Any]:
        """The plan as plain lists and numbers; the keys are the attributes."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"format": FORMAT, **plain}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `to_json`. Raises AutoparError naming what is missing or of the wrong kind."""
        if entry(data, "format", str) != FORMAT:
            raise AutoparError(f"'format' is {data['format']!r}, needed is {FORMAT!r}: make the plan again")
        kinds = {"gap": float, "solve_seconds": float, "nodes": int, "edges": int}
        names = ("model", "program_key", "cluster", "cluster_key", "mode", "precision", "optimizer", "status",
                 "attention", *kinds)
        plain: dict[str, Any] = {name: entry(data, name, kinds.get(name, str)) for name in names}
        ops = tuple(PlannedOp(entry(op, "name", str), entry(op, "segment", str), entries(op, "assignment", str),
                              entry(op, "strategy", str)) for op in entries(data, "ops", dict))
        parameters = tuple(PlannedParameter(*(entry(p, name, str) for name in ("name", "storage", "spec")))
                           for p in entries(data, "parameters", dict))
        return cls(**plain, mesh=entries(data, "mesh", int), seconds=_numbers(Seconds, data, "seconds"),
                   memory=_numbers(Bytes, data, "memory"), ops=ops, parameters=parameters,
                   fallback_ops=entries(data, "fallback_ops", str))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_whole(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan. Raises AutoparError when the file is no whole plan."""
        return cls.from_json(read_object(path))

    def __str__(self) -> str:
        width = max((len(op.name) for op in self.ops), default=0)
        shown = (op for op in self.ops if op.strategy)
        return "\n".join([*(f"{op.name:<{width}}  {op.strategy}" for op in shown), "", self.summary()])

    def summary(self) -> str:
        """Mesh, bytes by kind and the predicted step, in a few lines."""
        s, m = self.seconds, self.memory
        parts = {"compute": s.compute, "inline communication": s.inline, "exposed communication": s.exposed,
                 "optimizer": s.optimizer}
        split = ", ".join(f"{name} {1e3 * value:.3f}" for name, value in parts.items())
        held = ", ".join(f"{f.name} {getattr(m, f.name) / GIB:.3f}" for f in dataclasses.fields(m))
        at_rest = sorted({p.spec for p in self.parameters})
        lines = [
            f"mesh: {'x'.join(map(str, self.mesh))} of {self.cluster}, mode {self.mode}, {self.precision}, "
            f"{self.optimizer}",
            f"attention: {self.attention}" if self.attention else "",
            f"parameters at rest: {', '.join(at_rest)}",
            f"memory per device: {m.total / GIB:.3f} GiB ({held})",
            f"step: {1e3 * s.step:.3f} ms ({split}), gap {100 * self.gap:.2f} %",
            f"replicated for want of a rule: {', '.join(self.fallback_ops)}" if self.fallback_ops else "",
        ]
        return "\n".join(line for line in lines if line)


def _numbers(kind: type[Any], data: dict[str, Any], name: str) -> Any:
    table = entry(data, name, dict)
    return kind(**{f.name: entry(table, f.name, float) for f in dataclasses.fields(kind)})
