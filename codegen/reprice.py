"""Price a lowered program from what it does, without the solver.

Every node of every local graph is run on `meta`; ops are priced from the shapes that come out, collectives from
the reshards that stand in the graph. The sums follow `core.sharding`'s formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from autopar.codegen.arrivals import arrivals
from autopar.codegen.collectives import ReduceGradients, Reshard
from autopar.codegen.executable import Call, Executable
from autopar.codegen.lower import Lowered
from autopar.codegen.marks import names
from autopar.codegen.retained import Rates, Retained, fuses, retained
from autopar.core.checkpoint import keep
from autopar.core.reshard import MOVES_DATA, Primitive
from autopar.core.sharding import Priced, Sums
from autopar.passes.choices import compute_dtype
from autopar.passes.costs import work_of
from autopar.passes.decision import Decision
from autopar.passes.exchanges import Exchange, exchange_seconds
from autopar.passes.gathering import latency_share, shared_seconds
from autopar.passes.layout import itemsize, local_factors, whole_bytes
from autopar.passes.moments import held
from autopar.passes.ops import Op
from autopar.passes.problem import Setting

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes a device holds at the fullest moment of the step, by kind; `transient` is there for one segment's run.

    `around` is what is no tensor's, None where bytes are the rough sums of what ops make; `moment` names the moment
    where they are not.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    around: float | None = None
    moment: str = ""

    @property
    def total(self) -> float:
        """All tensors together."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.transient

    @property
    def device(self) -> float:
        """What a budget is compared with."""
        return self.total + (self.around or 0.0)


@dataclass(slots=True)
class Phase:
    """Seconds of one phase of a call: what its ops compute, what they send inside, and communication around them."""

    compute: float = 0.0
    talk: float = 0.0
    inline: float = 0.0
    hidden: float = 0.0
    again: float = 0.0

    @property
    def sums(self) -> Sums:
        """As `core.sharding` adds them up."""
        return Sums(self.compute + self.talk, self.inline, self.hidden)


@dataclass(slots=True)
class Tally:
    """What one call comes to; `working` are the bytes of its largest op, `share` that of a parameter in latencies.

    Of the seconds of parameters' communication `once` are those that a step takes once however many micro-batches it
    has, `again` in a phase those that each takes; `made` are the seconds of making what `marks` names.
    """

    share: float
    forward: Phase = field(default_factory=Phase)
    backward: Phase = field(default_factory=Phase)
    saved: float = 0.0
    working: float = 0.0
    once: float = 0.0
    made: dict[str, float] = field(default_factory=dict)


class Shapes(fx.Interpreter):
    """Runs a local graph on `meta` and keeps every value; modules answer with the shape of their result.

    `sent` has what modules say they send, by name.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.sent: dict[str, list[Exchange]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.submodules[target]
        if isinstance(module, Reshard):
            return torch.empty(module.final_shape, dtype=module.dtype, device="meta")
        if isinstance(module, ReduceGradients):
            return args[0]
        self.sent[str(target)] = module.exchanges(*args) if hasattr(module, "exchanges") else []
        return module.result(*args)


@dataclass(frozen=True, slots=True)
class Item:
    """What a call comes to: seconds of each phase, bytes it keeps in between, bytes of a device in its backward."""

    name: str
    forward: Sums
    backward: Sums
    saved: float
    held: float


def reprice(executable: Executable, setting: Setting) -> tuple[Priced, Memory]:
    """Seconds a step and bytes a device of a lowered program."""
    return itemised(executable, setting)[:2]


def itemised(executable: Executable, setting: Setting) -> tuple[Priced, Memory, tuple[Item, ...]]:
    """As `reprice`, and what it is made of, call by call."""
    tallies = tally_calls(executable, setting)
    kept = saved_by(executable, setting, tallies)
    moments = _moments(executable, setting, tallies, kept)
    items = tuple(Item(call.segment.name, tally.forward.sums, _with_more(tally.backward.sums, each.seconds), each.saved,
                       moment.total)
                  for call, tally, each, moment in zip(executable.calls, tallies, kept, moments[1:], strict=True))
    phases = [sums for item in items for sums in (item.forward, item.backward)]
    compute, inline, exposed = (sum(getattr(sums, part) for sums in phases) for part in ("work", "inline", "exposed"))
    memory = max(moments, key=lambda moment: moment.total)
    return Priced(compute, inline, exposed, _optimizer_seconds(executable, setting), memory.total), memory, items


def _with_more(sums: Sums, seconds: float) -> Sums:
    return replace(sums, work=sums.work + seconds)


@dataclass(frozen=True, slots=True)
class Held:
    """What one call holds from its forward to its backward in bytes, makes again in seconds, and holds meanwhile."""

    saved: float
    seconds: float = 0.0
    transient: float = 0.0


def saved_by(executable: Executable, setting: Setting, tallies: list[Tally]) -> list[Held]:
    """What each call holds: what the plan keeps, a value that crosses segments once, or else all results."""
    kept = executable.decision.kept
    if not kept:
        return [Held(tally.saved) for tally in tallies]
    found, seen = [], set[object]()
    needs = retained_by(executable, setting, tallies)
    for place, (call, need) in enumerate(zip(executable.calls, needs, strict=True)):
        each = keep(need.local, frozenset(kept[call.segment.name]))
        total = 0.0
        for v in each.saved:
            identity = need.identity(call, need.local.values[v].name) or (place, v)
            total += 0.0 if identity in seen else need.local.values[v].nbytes
            seen.add(identity)
        found.append(Held(total, each.seconds, each.transient))
    return found


def retained_by(executable: Executable, setting: Setting, tallies: list[Tally],
                fused: bool | None = None) -> list[Retained]:
    """What the backward of each call needs, where ops are `fused` or not; None: as is the default on the devices."""
    device, fused = setting.device, fuses(setting) if fused is None else fused
    cache: dict[int, Retained] = {}
    for call, tally in zip(executable.calls, tallies, strict=True):
        if id(call.lowered) not in cache:
            rates = Rates(tally.made, device.memory_bytes_per_s, fused)
            cache[id(call.lowered)] = retained(call.lowered, executable.decision, rates)
    return [cache[id(call.lowered)] for call in executable.calls]


def tally_calls(executable: Executable, setting: Setting) -> list[Tally]:
    """What each call comes to, ops multiplied by what was measured of their class."""
    cache: dict[int, Tally] = {}
    for call in executable.calls:
        if id(call.lowered) not in cache:
            tally = cache[id(call.lowered)] = _tally(call, executable, setting)
            name = executable.decision.context.segmented.class_name(call.segment.class_id)
            forward, backward = setting.factors.get(name, (1.0, 1.0))
            tally.forward.compute *= forward
            tally.backward.compute *= backward
            tally.made.update({value: forward * seconds for value, seconds in tally.made.items()})
    return [cache[id(call.lowered)] for call in executable.calls]


def _tally(call: Call, executable: Executable, setting: Setting) -> Tally:
    lowered, decision = call.lowered, executable.decision
    mixed = decision.context.segmented.factored.program.precision.endswith("-mixed")
    came = zip(lowered.segment.externals, arrivals(lowered, decision, executable.target.inputs), strict=True)
    arguments = [(each.resting() if mixed and node in decision.storage else each).blank(META) for node, each in came]
    shapes = Shapes(lowered.module)
    with torch.no_grad():
        seed = torch.empty((), dtype=torch.int64, device=META)
        shapes.run(*arguments, *[seed] * (1 + lowered.host_seeded))
    tally = Tally(latency_share(sum(node in decision.storage for node in lowered.segment.externals)))
    by_op: dict[int, list[fx.Node]] = {}
    for node in lowered.module.graph.nodes:
        if "op" in node.meta:
            by_op.setdefault(node.meta["op"], []).append(node)
        elif node.op == "call_module":
            _add_communication(node, shapes, tally, decision, setting, names(lowered))
    _add_outside(lowered, arguments, tally, decision, setting)
    called = names(lowered)
    for index, nodes in by_op.items():
        _add_op(decision.context.segmented.ops[index], nodes, shapes, tally, decision, setting, called)
    for node in lowered.segment.externals:
        if node in decision.storage:
            _add_gather(node, tally, decision, setting)
    return tally


def _add_communication(node: fx.Node, shapes: Shapes, tally: Tally, decision: Decision, setting: Setting,
                       called: dict[fx.Node, str]) -> None:
    module: nn.Module = shapes.submodules[str(node.target)]
    if isinstance(module, ReduceGradients):
        trained = {n.name for n in decision.storage if n in decision.context.gradients}
        found = [(n.name, _nbytes(shapes.env[n])) for n in node.all_input_nodes if n.name in trained]
        _add_sums(module.axes, found, tally, decision, setting)
        return
    assert isinstance(module, Reshard)
    _, differentiable = node.meta["reshard"]
    for step, nbytes in zip(module.steps, module.nbytes, strict=True):
        forward = setting.price(step.forward, step.axes, nbytes) if step.forward in MOVES_DATA else 0.0
        backward = setting.price(step.backward, step.axes, nbytes) if step.backward in MOVES_DATA else 0.0
        tally.forward.inline += forward
        tally.made[called[node]] = tally.made.get(called[node], 0.0) + forward
        tally.backward.inline += backward if differentiable else 0.0


def _add_sums(axes: tuple[int, ...], found: list[tuple[str, int]], tally: Tally, decision: Decision,
              setting: Setting) -> None:
    """One sum over `axes` of gradients of parameters that rest whole, by placeholder name and bytes."""
    gathered = {n.name: decision.mesh.extent(s.gathered) for n, s in decision.storage.items()}
    nbytes = sum(size / gathered[name] for name, size in found)
    seconds = _together(setting, "all_reduce", axes, nbytes, len(found) * tally.share)
    tally.backward.hidden += seconds
    tally.once += seconds


def _add_outside(lowered: Lowered, arguments: list[Tensor], tally: Tally, decision: Decision, setting: Setting) -> None:
    """The sums that are left to whoever runs the segment."""
    by_axes: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for node, axes, argument in zip(lowered.segment.externals, lowered.sums, arguments, strict=True):
        if axes and node in decision.context.gradients:
            by_axes.setdefault(axes, []).append((node.name, _nbytes(argument)))
    for axes, found in by_axes.items():
        _add_sums(axes, found, tally, decision, setting)


def _add_gather(node: fx.Node, tally: Tally, decision: Decision, setting: Setting) -> None:
    """The gathers of a parameter that rests sharded, and the scattered sum of its gradient."""
    factored, storage = decision.context.segmented.factored, decision.storage[node]
    trained = node in decision.context.gradients
    spec = storage.spec(len(factored.flat(node)), trained)
    elements = math.prod(local_factors(factored, node, spec, decision.mesh))
    gathered = _together(setting, "all_gather", storage.gathered, elements * itemsize(node), tally.share)
    tally.forward.hidden += gathered
    tally.once += gathered if storage.kept else 0.0
    tally.forward.again += 0.0 if storage.kept else gathered
    if trained:
        master = 4 if factored.program.precision.endswith("-mixed") else itemsize(node)
        scattered = _together(setting, "reduce_scatter", storage.gathered, elements * master, tally.share)
        tally.backward.hidden += scattered + (0.0 if storage.kept else gathered)
        tally.once += scattered
        tally.backward.again += 0.0 if storage.kept else gathered


def _together(setting: Setting, primitive: Primitive, axes: tuple[int, ...], nbytes: float, share: float) -> float:
    return shared_seconds(setting.price, setting.mesh, primitive, axes, nbytes, share)


def _add_op(op: Op, nodes: list[fx.Node], shapes: Shapes, tally: Tally, decision: Decision, setting: Setting,
            called: dict[fx.Node, str]) -> None:
    inside = set(nodes)
    read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside and n.name != "seed")
    made = {node.meta["origin"]: node for node in nodes}
    results = [shapes.env[made[r.node]] for r in op.results]
    operands = [shapes.env[n] for n in read]
    nbytes = float(sum(_nbytes(t) for t in [*operands, *results] if isinstance(t, Tensor)))
    main = made[op.main]
    read_by_main = [tuple(shapes.env[n].shape) for n in _tensors(main) if isinstance(shapes.env.get(n), Tensor)]
    shape = tuple(results[0].shape) if results else ()
    work = work_of(op.main, read_by_main, shape, nbytes, compute_dtype(op))
    device = setting.device
    through = any(r.node in decision.context.gradients for r in op.results)
    sent = [exchange for node in nodes if node.op == "call_module" for exchange in shapes.sent[str(node.target)]]
    talk = exchange_seconds(sent, setting.price)
    forward = work.forward_seconds(device)
    tally.made.update((called[node], forward + talk[0]) for node in nodes if node in called)
    tally.forward.compute += forward
    tally.forward.talk += talk[0]
    if through:
        tally.backward.compute += work.backward_seconds(device)
        tally.backward.talk += talk[1]
    made_here = zip(op.results, results, strict=True)
    tally.working = max(tally.working, nbytes + work.beside.room)
    tally.saved += sum(_nbytes(t) for r, t in made_here if r.node in decision.context.gradients)
    tally.saved += work.beside.kept if through else 0.0


def _tensors(node: fx.Node) -> Iterable[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(node.args, found.append)
    return found


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _optimizer_seconds(executable: Executable, setting: Setting) -> float:
    decision, factored = executable.decision, executable.decision.context.segmented.factored
    return sum(whole_bytes(factored, node) / itemsize(node) / storage.resting_parts(decision.mesh)
               * setting.optimizer.step_bytes / setting.device.memory_bytes_per_s
               for node, storage in decision.storage.items() if node in decision.context.gradients)


def copied(decision: Decision, node: fx.Node) -> bool:
    """Whether a parameter's copy in the compute dtype is held whatever the segments keep: FSDP2 does so."""
    return not decision.kept or bool(decision.storage[node].gathered)


def _moments(executable: Executable, setting: Setting, tallies: list[Tally], saves: list[Held]) -> list[Memory]:
    """The bytes between backward and forward, and in the backward of each call, of which the last comes first."""
    decision = executable.decision
    kept = {node: held(decision.context, node, storage, decision.mesh, setting.optimizer.state_bytes)
            for node, storage in decision.storage.items()}
    read = [[node for node in dict.fromkeys(call.segment.externals) if node in kept] for call in executable.calls]
    last = {node: place for place, nodes in enumerate(read) for node in nodes}
    parameters, state = sum(h.parameter for h in kept.values()), sum(h.state for h in kept.values())
    saved, gradients = 0.0, sum(h.gradient for h in kept.values())
    seen: set[fx.Node] = set()
    found = [Memory(parameters, gradients, state, 0.0, 0.0)]
    for place, (tally, each, nodes) in enumerate(zip(tallies, saves, read, strict=True)):
        saved += each.saved + sum(kept[node].copy for node in nodes if node not in seen and copied(decision, node))
        seen.update(nodes)
        working = tally.working + each.transient + sum(kept[n].working for n in nodes)
        found.append(Memory(parameters, gradients, state, saved, working))
        gradients -= sum(kept[node].gradient for node in nodes if last[node] == place)
    return found
