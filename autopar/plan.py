"""Everything decided for one program on one cluster; saved as JSON, checked without the solver."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from autopar.core.errors import AutoparError
from autopar.core.files import entries, entry, typed, write_whole
from autopar.core.presets import MOST_DEVICES
from autopar.core.reading import check_path, read_as
from autopar.difference import Difference, changes

FORMAT = "autopar plan 2"
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
    """A predicted step: the parts add up to `step`. `bubble` is the wait of a pipeline, 0 without one."""

    step: float
    compute: float
    inline: float
    exposed: float
    optimizer: float
    bubble: float = 0.0

    def __post_init__(self) -> None:
        _check_finite("seconds", dataclasses.asdict(self))


@dataclass(frozen=True, slots=True)
class Bytes:
    """Predicted bytes of one device at the fullest moment of a step, by kind."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    transient: float

    def __post_init__(self) -> None:
        _check_finite("memory", dataclasses.asdict(self))

    @property
    def total(self) -> float:
        """All kinds together."""
        return float(sum(dataclasses.astuple(self)))

    @property
    def peak(self) -> float:
        """The most bytes at any time."""
        return self.total

    @property
    def device(self) -> float:
        """What a budget is compared with. Context and communication buffers are not in it: a device's default budget
        leaves them room."""
        return self.peak


@dataclass(frozen=True, slots=True)
class Workload:
    """What a step does, however it is cut: samples and tokens of the global batch, None where it has no tokens.

    `flop` is counted once in the whole program: those of matmuls, convolutions and attention in the forward, half of
    them under a causal mask, and twice as many in the backward where a gradient flows through. Recomputation and
    pointwise work are not in it.
    """

    samples: int
    tokens: int | None
    flop: float


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
    solve_s: float
    workload: Workload
    peak_flops_per_s: float

    def __post_init__(self) -> None:
        _check_finite("plan", {"gap": self.gap, "solve_s": self.solve_s, "peak_flops_per_s": self.peak_flops_per_s,
                               "flop": self.workload.flop})
        if not self.mesh or min(self.mesh) < 1 or math.prod(self.mesh) > MOST_DEVICES:
            raise AutoparError(f"'mesh' is {list(self.mesh)}, needed are sizes above 0 that multiply to at most "
                               f"{MOST_DEVICES}: make the plan again")
        for kind, planned in (("op", self.ops), ("parameter", self.parameters)):
            name, times = next(iter(Counter(each.name for each in planned).most_common(1)), ("", 0))
            if times > 1:
                raise AutoparError(f"{kind} {name} is planned {times} times, needed is once: make the plan again")
        for op in self.ops:
            if len(op.assignment) != len(self.mesh):
                raise AutoparError(f"'assignment' of op {op.name} is {list(op.assignment)}, needed is an entry for "
                                   f"each of the {len(self.mesh)} axes: make the plan again")

    @property
    def step_time_s(self) -> float:
        """Seconds a step."""
        return self.seconds.step

    @property
    def compute_s(self) -> float:
        """Seconds of computing."""
        return self.seconds.compute

    @property
    def inline_s(self) -> float:
        """Seconds of communication that computing waits for."""
        return self.seconds.inline

    @property
    def exposed_s(self) -> float:
        """Seconds of parameters' communication that computing does not hide."""
        return self.seconds.exposed

    @property
    def communication_s(self) -> float:
        """Seconds of all communication that is not hidden."""
        return self.seconds.inline + self.seconds.exposed

    @property
    def optimizer_s(self) -> float:
        """Seconds of the optimizer's step."""
        return self.seconds.optimizer

    @property
    def bubble_s(self) -> float:
        """Seconds that devices wait for a pipeline."""
        return self.seconds.bubble

    @property
    def samples_per_s(self) -> float:
        """Samples a second of the whole cluster."""
        return self.workload.samples / self.seconds.step

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second of the whole cluster."""
        return None if self.workload.tokens is None else self.workload.tokens / self.seconds.step

    @property
    def mfu(self) -> float:
        """The workload's FLOP a second as a fraction of `peak_flops_per_s`, all devices' peak in the compute dtype."""
        return self.workload.flop / self.seconds.step / self.peak_flops_per_s

    @property
    def memory_bytes(self) -> dict[str, float]:
        """Bytes of one device by kind, their peak, and what the budget is compared with."""
        return {**dataclasses.asdict(self.memory), "peak": self.memory.peak, "device": self.memory.device}

    def to_json(self) -> dict[str, Any]:
        """The plan as plain lists and numbers; the keys are the fields."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"format": FORMAT, **plain}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `to_json`. Raises AutoparError naming what is missing or of the wrong kind."""
        if entry(typed("a plan", data, dict), "format", str) != FORMAT:
            raise AutoparError(f"'format' is {data['format']!r}, needed is {FORMAT!r}: make the plan again")
        kinds = {"gap": float, "solve_s": float, "nodes": int, "edges": int, "peak_flops_per_s": float}
        names = ("model", "program_key", "cluster", "cluster_key", "mode", "precision", "optimizer", "status",
                 "attention", *kinds)
        plain: dict[str, Any] = {name: entry(data, name, kinds.get(name, str)) for name in names}
        ops = tuple(PlannedOp(entry(op, "name", str), entry(op, "segment", str), entries(op, "assignment", str),
                              entry(op, "strategy", str)) for op in entries(data, "ops", dict))
        parameters = tuple(PlannedParameter(*(entry(p, name, str) for name in ("name", "storage", "spec")))
                           for p in entries(data, "parameters", dict))
        return cls(**plain, mesh=entries(data, "mesh", int), seconds=_numbers(Seconds, data, "seconds"),
                   memory=_numbers(Bytes, data, "memory"), workload=_workload(entry(data, "workload", dict)), ops=ops,
                   parameters=parameters, fallback_ops=entries(data, "fallback_ops", str))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_whole(check_path("the path of a plan", path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan. Raises AutoparError naming the file when it is no whole plan."""
        return read_as("a plan", path, cls.from_json)

    def verify(self, program: Any, cluster: Any) -> tuple[float, float]:
        """(seconds, bytes) recomputed from the lowered program; `program` is what `autopar.capture` made, or what
        was prepared of it. Raises AutoparError when the plan is for another model or cluster, or its claims are off."""
        found: tuple[float, float] = _when_called("planner", "verify")(self, program, cluster)
        return found

    def explain(self, program: Any, cluster: Any, op: str) -> Any:
        """What each alternative for the op called `op` would have cost; see `autopar.explain`."""
        return _when_called("explanation", "explain")(self, program, cluster, op)

    def diff(self, other: Plan) -> Difference:
        """Where `other` decides otherwise, and what either comes to."""
        def words(plan: Plan) -> dict[str, tuple[str, ...]]:
            told = {name: getattr(plan, name) for name in ("model", "cluster", "mode", "precision", "optimizer")}
            return {"mesh": ("x".join(map(str, plan.mesh)),), **{name: (text,) for name, text in told.items()}}

        def ops(plan: Plan) -> dict[str, tuple[str, ...]]:
            return {op.name: (op.strategy, _said(",".join(op.assignment))) for op in plan.ops}

        def parameters(plan: Plan) -> dict[str, tuple[str, ...]]:
            return {p.name: (p.spec, _said(p.storage)) for p in plan.parameters}

        said, cut, rest = (changes(of(self), of(other)) for of in (words, ops, parameters))
        return Difference(said, cut, rest, (self.seconds.step, other.seconds.step),
                          (self.memory.total, other.memory.total))

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


def _when_called(module: str, name: str) -> Any:
    """A function of a module above this one: plans are read without torch, and what prices them reads plans."""
    return getattr(importlib.import_module(f"autopar.{module}"), name)


def _said(axes: str) -> str:
    """What every axis does, once where all do the same: on meshes of any number of axes alike."""
    first, *rest = axes.split(",")
    return first if all(other == first for other in rest) else axes


def _numbers(kind: type[Any], data: dict[str, Any], name: str) -> Any:
    table = entry(data, name, dict)
    return kind(**{f.name: entry(table, f.name, float) for f in dataclasses.fields(kind)})


def _workload(table: dict[str, Any]) -> Workload:
    tokens = None if "tokens" in table and table["tokens"] is None else entry(table, "tokens", int)
    return Workload(entry(table, "samples", int), tokens, entry(table, "flop", float))


def _check_finite(what: str, figures: dict[str, float]) -> None:
    """Raises AutoparError for a figure that is not a number or infinite: a file may hold those too."""
    for name, value in figures.items():
        if not math.isfinite(value):
            raise AutoparError(f"{name!r} of {what} is {value}, needed is a finite number: make the plan again")
