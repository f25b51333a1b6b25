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
from autopar.core.observed import Observed, observed_from_json
from autopar.core.presets import MOST_DEVICES
from autopar.core.reading import check_path, read_as
from autopar.core.schedules import Pipe, check_schedule
from autopar.difference import Difference, changes
from autopar.listing import listing
from autopar.planned import (
    ALONE,
    SECONDS,
    Bytes,
    Pipelining,
    PlannedCheckpoint,
    PlannedOp,
    PlannedParameter,
    PlannedSegment,
    PlannedStage,
    Seconds,
    Workload,
    check_finite,
)

FORMAT = "autopar plan 5"
WORDS = ("model", "program_key", "cluster", "cluster_key", "mode", "precision", "optimizer", "status", "attention")
FIGURES = ("gap", "step_time_s", "compute_s", "inline_s", "exposed_s", "optimizer_s", "bubble_s", "communication_s",
           "samples_per_s", "tokens_per_s", "mfu", "samples", "tokens", "flop", "peak_flops_per_s", "nodes", "edges",
           "solve_s", "observed_peak")
"""The attributes of a plan that its file tells, under the same names; lists, tables and `memory_bytes` besides."""
KINDS = ("parameters", "gradients", "optimizer", "activations", "transient")
GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision with its claims. `gap` is the fraction by which it may miss the optimum of its mode and mesh.

    `observed` is what was measured of its segments, none where seconds are the roofline's; `observed_peak` the bytes of
    a device that a step then comes to, 0 where nothing was measured.
    """

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
    observed: tuple[Observed, ...] = ()
    observed_peak: float = 0.0
    pipelining: Pipelining = ALONE
    checkpoints: tuple[PlannedCheckpoint, ...] = ()
    segments: tuple[PlannedSegment, ...] = ()

    def __post_init__(self) -> None:
        check_finite("plan", {"gap": self.gap, "solve_s": self.solve_s, "peak_flops_per_s": self.peak_flops_per_s,
                               "flop": self.workload.flop, "observed_peak": self.observed_peak})
        if not self.mesh or min(self.mesh) < 1 or math.prod(self.mesh) > MOST_DEVICES:
            raise AutoparError(f"'mesh' is {list(self.mesh)}, needed are sizes above 0 that multiply to at most "
                               f"{MOST_DEVICES}: make the plan again")
        for kind, planned in (("op", self.ops), ("parameter", self.parameters)):
            name, times = next(iter(Counter(each.name for each in planned).most_common(1)), ("", 0))
            if times > 1:
                raise AutoparError(f"{kind} {name} is planned {times} times, needed is once: make the plan again")
        check_stages(self.pipelining, self.mesh)
        for op in self.ops:
            if len(op.assignment) != len(self.mesh):
                raise AutoparError(f"'assignment' of op {op.name} is {list(op.assignment)}, needed is an entry for "
                                   f"each of the {len(self.mesh)} axes: make the plan again")

    @property
    def stages(self) -> tuple[PlannedStage, ...]:
        """The stages of a pipeline, none without one."""
        return self.pipelining.stages

    @property
    def micro_batches(self) -> int:
        """Micro-batches a step, 1 without a pipeline."""
        return self.pipelining.micro_batches

    @property
    def schedule(self) -> str:
        """The order in which stages run micro-batches."""
        return self.pipelining.schedule

    @property
    def devices(self) -> int:
        """How many devices it runs on."""
        return math.prod(self.mesh) * max(1, len(self.pipelining.places))

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
    def samples(self) -> int:
        """Samples of the global batch."""
        return self.workload.samples

    @property
    def tokens(self) -> int | None:
        """Tokens of the global batch, None where it has none."""
        return self.workload.tokens

    @property
    def flop(self) -> float:
        """The workload's FLOP a step."""
        return self.workload.flop

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
        """Bytes of one device by kind, their peak, and what the budget is compared with; `around` where it is known."""
        return {**self.memory.by_kind, "peak": self.observed_peak or self.memory.peak,
                "device": self.memory.device}

    @property
    def peak_at(self) -> str:
        """The moment at which a device holds most, "" where bytes are not told moment by moment."""
        return self.memory.moment

    def to_json(self) -> dict[str, Any]:
        """The plan as plain lists and numbers; the keys are attributes."""
        rows = {name: [dataclasses.asdict(each) for each in getattr(self, name)]
                for name in ("ops", "parameters", "stages", "observed", "checkpoints", "segments")}
        told = {name: getattr(self, name) for name in (*WORDS, *FIGURES, "mesh", "memory_bytes", "peak_at",
                                                       "fallback_ops", "micro_batches", "schedule")}
        plain: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **told, **rows}))
        return plain

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `to_json`; what follows from the rest is not read. Raises AutoparError naming what is missing
        or of the wrong kind."""
        if entry(typed("a plan", data, dict), "format", str) != FORMAT:
            raise AutoparError(f"'format' is {data['format']!r}, needed is {FORMAT!r}: make the plan again")
        kinds = {"gap": float, "solve_s": float, "nodes": int, "edges": int, "peak_flops_per_s": float}
        plain: dict[str, Any] = {name: entry(data, name, kinds.get(name, str)) for name in (*WORDS, *kinds)}
        ops = tuple(PlannedOp(entry(op, "name", str), entry(op, "segment", str), entries(op, "assignment", str),
                              entry(op, "strategy", str)) for op in entries(data, "ops", dict))
        parameters = tuple(PlannedParameter(*(entry(p, name, str) for name in ("name", "storage", "spec")))
                           for p in entries(data, "parameters", dict))
        checkpoints = tuple(map(_checkpoint, entries(data, "checkpoints", dict))) if "checkpoints" in data else ()
        segments = tuple(map(_segment, entries(data, "segments", dict)))
        seconds = Seconds(**{part: entry(data, name, float) for name, part in SECONDS.items()})
        observed = tuple(map(observed_from_json, entries(data, "observed", dict) if "observed" in data else ()))
        held = entry(data, "memory_bytes", dict)
        memory = Bytes(**{name: entry(held, name, float) for name in KINDS}, around=_around(held),
                       moment=entry(data, "peak_at", str) if "peak_at" in data else "")
        peak = entry(data, "observed_peak", float) if "observed_peak" in data else 0.0
        return cls(**plain, mesh=entries(data, "mesh", int), seconds=seconds, memory=memory, workload=_workload(data),
                   ops=ops, parameters=parameters, observed=observed, observed_peak=peak,
                   fallback_ops=entries(data, "fallback_ops", str), pipelining=_pipelining(data),
                   checkpoints=checkpoints, segments=segments)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_whole(check_path("the path of a plan", path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan. Raises AutoparError naming the file when it is no whole plan."""
        return read_as("a plan", path, cls.from_json)

    def verify(self, program: Any, cluster: Any) -> tuple[float, float]:
        """(seconds, bytes) recomputed from the lowered program; `program` is what `autopar.capture` made in the
        plan's precision, or what was prepared of it, `cluster` as `autopar.plan` takes it. Raises AutoparError when the
        plan is for another model, cluster or precision, or its claims are off."""
        found: tuple[float, float] = _when_called("planner", "verify")(self, program, cluster)
        return found

    def emit(self, path: str | os.PathLike[str], program: Any, cluster: Any) -> None:
        """Write what one rank runs to `path` as Python that is read and run under torchrun, whole or not at all;
        `program` and what is refused are as for `verify`."""
        checked = check_path("the path of a program", path)
        write_whole(checked, _when_called("emission", "text_of")(self, program, cluster, checked))

    def explain(self, program: Any, cluster: Any, op: str) -> Any:
        """What each alternative for the op called `op` would have cost; see `autopar.explain`."""
        return _when_called("explanation", "explain")(self, program, cluster, op)

    def timeline(self, path: str | os.PathLike[str]) -> None:
        """Draw a step as it is predicted, a row a device, to a page (`.html`) or a picture (`.png`), whole or not at
        all. Raises AutoparError."""
        _when_called("timeline", "draw")(self, check_path("the path of a timeline", path))

    def stage_table(self) -> list[str]:
        """A line a stage: its segments, seconds a micro-batch, GiB and devices; none without stages."""
        return [f"stage {j}: {stage.first}" + (f" to {stage.last}, {stage.segments} segments" if stage.segments > 1
                                               else "")
                + f"; {1e3 * stage.forward_s:.3f} ms forward, {1e3 * stage.backward_s:.3f} ms backward, "
                f"{1e3 * stage.sent_s:.3f} ms to send; {stage.nbytes / GIB:.3f} GiB with {stage.in_flight} "
                f"micro-batches; devices {_ranges(stage.devices)}" for j, stage in enumerate(self.stages)]

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
        """One line an op, equal layers once, then the summary."""
        kept = "".join(f"\n{checkpoint}" for checkpoint in self.checkpoints)
        return f"{listing(self.ops, self.parameters)}\n{kept}\n{self.summary()}"

    def summary(self) -> str:
        """Mesh, bytes by kind and the predicted step, in a few lines."""
        s, m = self.seconds, self.memory
        parts = {"compute": s.compute, "inline communication": s.inline, "exposed communication": s.exposed,
                 "optimizer": s.optimizer}
        split = ", ".join(f"{name} {1e3 * value:.3f}" for name, value in parts.items())
        held = ", ".join(f"{name} {getattr(m, name) / GIB:.3f}" for name in KINDS)
        beside = "" if not m.around else f", and {m.around / GIB:.3f} of context and communication buffers"
        beside += f"; fullest in the {m.moment}" if m.moment else ""
        at_rest = sorted({p.spec for p in self.parameters})
        staged = (f"{len(self.stages)} stages, {self.micro_batches} micro-batches by {self.schedule}, each on "
                  if self.stages else "")
        lines = [
            *self.stage_table(),
            f"mesh: {staged}{'x'.join(map(str, self.mesh))} of {self.cluster}, mode {self.mode}, {self.precision}, "
            f"{self.optimizer}",
            f"attention: {self.attention}" if self.attention else "",
            f"parameters at rest: {', '.join(at_rest)}",
            f"memory per device: {m.total / GIB:.3f} GiB ({held}){beside}",
            f"step: {1e3 * s.step:.3f} ms ({split}), gap {100 * self.gap:.2f} %",
            f"replicated for want of a rule: {', '.join(self.fallback_ops)}" if self.fallback_ops else "",
        ]
        return "\n".join(line for line in lines if line)


def _when_called(module: str, name: str) -> Any:
    """A function of a module above this one: plans are read without torch, and what prices them reads plans."""
    return getattr(importlib.import_module(f"autopar.{module}"), name)


def _ranges(numbers: tuple[int, ...]) -> str:
    """Devices in a few words, such as `0-3, 8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _said(axes: str) -> str:
    """What every axis does, once where all do the same: on meshes of any number of axes alike."""
    first, *rest = axes.split(",")
    return first if all(other == first for other in rest) else axes


STAGE = {"first": str, "last": str, "segments": int, "forward_s": float, "backward_s": float, "sent_s": float,
         "nbytes": float, "in_flight": int}


def _pipelining(data: dict[str, Any]) -> Pipelining:
    stages = tuple(PlannedStage(**{name: entry(each, name, kind) for name, kind in STAGE.items()},
                                devices=entries(each, "devices", int)) for each in entries(data, "stages", dict))
    return Pipelining(stages, entry(data, "micro_batches", int), entry(data, "schedule", str))


def check_stages(found: Pipelining, mesh: tuple[int, ...]) -> None:
    """Raises AutoparError unless stages have each device once, as many as the mesh has, and there are micro-batches."""
    if found.micro_batches < 1:
        raise AutoparError(f"'micro_batches' is {found.micro_batches}, needed is at least 1: make the plan again")
    if found.stages:
        check_schedule(found.schedule, Pipe(len(found.stages), len(found.places), found.micro_batches))
    every = found.layout
    wrong = [place for place in found.places if len(place) != math.prod(mesh)]
    turned = [stage.devices for stage in found.stages] != [found.places[j % len(found.places)]
                                                           for j in range(len(found.stages))]
    if wrong or turned or sorted(every) != list(range(len(every))):
        raise AutoparError(f"'devices' of the stages are {[list(stage.devices) for stage in found.stages]}, needed "
                           f"are {math.prod(mesh)} a stage, each of 0 to {max(len(every) - 1, 0)} once, over again "
                           "where there are more stages: make the plan again")


def _checkpoint(table: dict[str, Any]) -> PlannedCheckpoint:
    segments, names, shown = (entries(table, name, str) for name in ("segments", "names", "shown"))
    saved, transient, seconds = (entry(table, name, float) for name in ("saved", "transient", "seconds"))
    return PlannedCheckpoint(segments, names, shown, saved, transient, seconds)


def _around(held: dict[str, Any]) -> float | None:
    return None if held.get("around") is None else entry(held, "around", float)


def _segment(table: dict[str, Any]) -> PlannedSegment:
    figures = (f.name for f in dataclasses.fields(PlannedSegment) if f.name != "name")
    return PlannedSegment(entry(table, "name", str), *(entry(table, name, float) for name in figures))


def _workload(table: dict[str, Any]) -> Workload:
    tokens = None if "tokens" in table and table["tokens"] is None else entry(table, "tokens", int)
    return Workload(entry(table, "samples", int), tokens, entry(table, "flop", float))
