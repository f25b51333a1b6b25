"""A lowered program as an assembly of stages sees it: runs of equal segments, what each costs, what crosses a cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from autopar.codegen.executable import Call, Executable
from autopar.codegen.reprice import Memory, Tally, copied, retained_by, tally_calls
from autopar.codegen.stages import bonds_of, ports_behind
from autopar.codegen.surrounding import surrounding_bytes
from autopar.core.assembly import Entry, Instance, Place, Run, Tie, waits
from autopar.core.checkpoint import Kept, keep
from autopar.core.collectives import stage_link
from autopar.core.schedules import Pipe, Schedule, in_flight
from autopar.core.sharding import Sums
from autopar.passes.costs import MASTER_BYTES, slowest
from autopar.passes.decision import Decision
from autopar.passes.layout import itemsize, whole_bytes
from autopar.passes.moments import held
from autopar.passes.problem import Setting
from autopar.passes.strategies import Storage
from autopar.solver.checkpoint import menu

CHUNKS = 2
"""Stages a device where they are interleaved: with more the same waits less, and sends more."""


@dataclass(frozen=True, slots=True)
class Costed:
    """One call of a program: its tally, entry and bytes by kind, and the bytes that a device sends behind it; `again`
    are seconds of the backward in which results are made again."""

    tally: Tally
    entry: Entry
    memory: Memory
    optimizer: float
    sent: float
    again: float = 0.0

    def keeping(self, kept: Kept) -> Costed:
        """The same call where it keeps `kept` for its backward and makes the rest again."""
        e = self.entry
        return replace(self, again=kept.seconds, entry=replace(
            e, backward=e.backward + kept.seconds, saved=kept.nbytes, working=e.working + kept.transient))


@dataclass(frozen=True, slots=True)
class Assembly:
    """The instance of a program's stages, and its calls one by one."""

    instance: Instance
    calls: tuple[Costed, ...]


Menus = tuple[tuple[Kept, ...], ...]
"""For each call of a program what it may keep."""
FEW = 4
"""About as many entries are sought for each price of the bytes that are there for one micro-batch."""


def menus_of(executable: Executable, setting: Setting, solver: str = "cbc") -> Menus:
    """What each call may keep: good choices where bytes count for all micro-batches on their way, and for one."""
    flight = min(setting.stages, setting.micro_batches)
    found: dict[int, tuple[Kept, ...]] = {}
    needs = retained_by(executable, setting, tally_calls(executable, setting))
    for need in needs:
        if id(need) not in found:
            choices = (kept for share in (1.0, 1.0 / flight) for kept in menu(need.local, share, solver, FEW))
            found[id(need)] = tuple(dict.fromkeys(choices))
    return tuple(found[id(need)] for need in needs)


def assembly_of(executable: Executable, setting: Setting, schedule: Schedule, menus: Menus = ()) -> Assembly:
    """The assembly problem of a lowered program in a setting with stages; with `menus` each call has those entries, and
    else the one that is decided."""
    pipe = pipe_of(schedule, setting)
    calls = _calls(executable, setting)
    if executable.decision.kept and not menus:
        calls = _decided(calls, executable, setting)
    lowered = [id(call.lowered) for call in executable.calls]
    runs = [list(run) for run in _alike(calls, lowered)]
    entries = [tuple(calls[i].keeping(kept).entry for kept in menus[i]) if menus else (calls[i].entry,)
               for i, *_ in runs]
    made = tuple(Run(executable.calls[run[0]].segment.name, len(run), each, calls[run[0]].sent, calls[run[-1]].sent)
                 for run, each in zip(runs, entries, strict=True))
    return Assembly(Instance(made, _places(setting, pipe, schedule), setting.micro_batches,
                             _ties(executable, runs, setting), pipe.devices, bonds_of(executable)), calls)


def pipe_of(schedule: Schedule, setting: Setting) -> Pipe:
    """The pipeline of a setting: by the schedule "looped" of a stage more than there are places, by "interleaved" of
    several a place."""
    stages = {"looped": setting.stages + 1, "interleaved": CHUNKS * setting.stages}.get(schedule, setting.stages)
    return Pipe(stages, setting.stages, setting.micro_batches)


def _alike(calls: Sequence[Costed], lowered: Sequence[int]) -> list[list[int]]:
    """Runs of equal calls, behind each of which but the last as much is sent."""
    runs: list[list[int]] = []
    for i, key in enumerate(lowered):
        last = runs[-1] if runs else []
        if last and lowered[last[-1]] == key and (len(last) == 1 or calls[last[0]].sent == calls[last[-1]].sent) \
                and calls[last[-1]].entry == calls[i].entry:
            last.append(i)
        else:
            runs.append([i])
    return runs


def _decided(calls: Sequence[Costed], executable: Executable, setting: Setting) -> tuple[Costed, ...]:
    """The calls as each keeps what the decision says."""
    kept = executable.decision.kept
    needs = retained_by(executable, setting, [call.tally for call in calls])
    return tuple(costed.keeping(keep(need.local, frozenset(kept[call.segment.name])))
                 for costed, need, call in zip(calls, needs, executable.calls, strict=True))


def _calls(executable: Executable, setting: Setting) -> tuple[Costed, ...]:
    sent = [sum(port.nbytes for port in ports) for ports in ports_behind(executable)]
    return tuple(_call(call, tally, executable.decision, setting, nbytes)
                 for call, tally, nbytes in zip(executable.calls, tally_calls(executable, setting), sent, strict=True))


def _call(call: Call, tally: Tally, decision: Decision, setting: Setting, sent: float) -> Costed:
    nodes = [node for node in dict.fromkeys(call.segment.externals) if node in decision.storage]
    kept = [held(decision.context, n, decision.storage[n], decision.mesh, setting.optimizer.state_bytes) for n in nodes]
    gradients = sum(_gradient(decision, n, decision.storage[n], h.gradient) for n, h in zip(nodes, kept, strict=True))
    parameters, state = sum(h.parameter for h in kept), sum(h.state for h in kept)
    copies = sum(h.copy for n, h in zip(nodes, kept, strict=True) if copied(decision, n))
    working = tally.working + sum(h.working for h in kept)
    optimizer = sum(_step_seconds(decision, n, setting) for n in nodes)
    forward, backward = (each.sums.work + each.inline + Sums(each.sums.work, each.inline, each.again).exposed
                         for each in (tally.forward, tally.backward))
    static = parameters + state + gradients + copies
    entry = Entry(forward, backward, tally.once + optimizer, static, tally.saved, working)
    return Costed(tally, entry, Memory(parameters, gradients, state, copies, working), optimizer, sent)


def _gradient(decision: Decision, node: fx.Node, storage: Storage, resting: float) -> float:
    """Bytes of a gradient while micro-batches add to it: whole over the axes it is scattered over at the end."""
    if not storage.gathered or not resting:
        return resting
    factored = decision.context.segmented.factored
    used = whole_bytes(factored, node) / decision.mesh.extent(storage.spec(decision.context.rank(node), False).axes)
    return used / itemsize(node) * MASTER_BYTES


def _step_seconds(decision: Decision, node: fx.Node, setting: Setting) -> float:
    if node not in decision.context.gradients:
        return 0.0
    elements = whole_bytes(decision.context.segmented.factored, node) / itemsize(node)
    parts = decision.storage[node].resting_parts(decision.mesh)
    return elements / parts * setting.optimizer.step_bytes / setting.device.memory_bytes_per_s


def _places(setting: Setting, pipe: Pipe, schedule: Schedule) -> tuple[Place, ...]:
    """Where each stage runs, and what its tensors may hold there."""
    size, found, around = setting.mesh.size, [], surrounding_bytes(setting)
    shown = waits(pipe.stages) if schedule == "1f1b" else (0.0,) * pipe.stages
    parts = [setting.layout[j * size:(j + 1) * size] for j in range(pipe.devices)]
    for j in range(pipe.stages):
        mine, following = (parts[i % pipe.devices] for i in (j, j + 1))
        alpha, beta = stage_link(setting.cluster, tuple(zip(mine, following, strict=False)))
        here = slowest([setting.cluster.devices[d] for d in mine])
        slow = setting.device.matmul_flops("bf16") / here.matmul_flops("bf16")
        found.append(Place(setting.budget_of(mine) - around, slow, in_flight(schedule, pipe, j), alpha, beta, shown[j]))
    return tuple(found)


def _ties(executable: Executable, runs: Sequence[Sequence[int]], setting: Setting) -> tuple[Tie, ...]:
    """Runs that read one parameter, whose gradients are added up where they are on different stages."""
    decision, readers = executable.decision, dict[fx.Node, list[int]]()
    for r, run in enumerate(runs):
        for node in dict.fromkeys(n for i in run for n in executable.calls[i].segment.externals):
            if node in decision.storage and node in decision.context.gradients:
                readers.setdefault(node, []).append(r)
    size = setting.mesh.size
    links = [stage_link(setting.cluster, tuple(zip(setting.layout[:size], setting.layout[-size:], strict=True)))]
    found = []
    for node, places in readers.items():
        for first, second in itertools.pairwise(places):
            factored = decision.context.segmented.factored
            nbytes = (whole_bytes(factored, node) / itemsize(node) * MASTER_BYTES
                      / decision.storage[node].resting_parts(decision.mesh))
            found.append(Tie(first, second, max(alpha + beta * nbytes for alpha, beta in links), nbytes))
    return tuple(found)
