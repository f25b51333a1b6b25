"""What the backward of a lowered segment needs of its forward: `core.checkpoint.Local`, read from its joint graph.

The joint graph is traced as it will be when the segment runs, on tensors without values. Where Inductor compiles,
pointwise work that is done again is part of the kernel that reads it: it costs what it reads and, where a matmul or
another kernel of its own wants the result, the writing of that. Where ops run one by one each costs what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, fx

from autopar.codegen import private
from autopar.codegen.executable import Call
from autopar.codegen.footprint import Kernels
from autopar.codegen.joint import Joint, costly, joint, size_of
from autopar.codegen.lower import Lowered
from autopar.codegen.marks import exported, marked
from autopar.core.checkpoint import Local, Read, Value
from autopar.passes.capture import COMPUTE_DTYPE
from autopar.passes.decision import Decision
from autopar.passes.layout import local_shape
from autopar.passes.problem import Setting


@dataclass(frozen=True, slots=True)
class Rates:
    """`ops` are the seconds of doing what makes a value, by the value's name; `bytes_per_s` those of memory; whether
    pointwise work is `fused` into what reads it."""

    ops: Mapping[str, float]
    bytes_per_s: float
    fused: bool


def fuses(setting: Setting) -> bool:
    """Whether segments are compiled on the devices of a setting, as is the default there."""
    return any(device.kind != "cpu" for device in setting.cluster.devices)


@dataclass(frozen=True, eq=False)
class Retained:
    """What the backward of a lowered segment needs, and which of it comes from other segments or goes to them.

    `entering` are the places of externals by the name of their value, `leaving` the exports; `joint` is None where no
    gradient flows.
    """

    joint: Joint | None
    local: Local
    entering: Mapping[str, int]
    leaving: Mapping[str, fx.Node]
    base: Callable[[fx.Node], fx.Node]

    def identity(self, call: Call, name: str) -> fx.Node | None:
        """The op's result that a value is, where other segments know it too."""
        if name in self.entering:
            return self.base(call.segment.externals[self.entering[name]])
        if name in self.leaving:
            place = call.lowered.exports.index(self.leaving[name])
            return self.base(call.exports[place])
        return None


_KNOWN: WeakKeyDictionary[Lowered, Retained] = WeakKeyDictionary()


def retained(lowered: Lowered, decision: Decision, rates: Rates) -> Retained:
    """What the backward of `lowered` needs, traced once. Values that come from other segments are called `x` and their
    place."""
    if lowered not in _KNOWN:
        _KNOWN[lowered] = _retained(lowered, decision, rates)
    return _KNOWN[lowered]


_JOINTS: WeakValueDictionary[Hashable, Joint] = WeakValueDictionary()
"""Joint graphs by what they are traced of: the ways that are tried often cut a segment alike, and tracing one is most
of what planning within a budget takes."""


def _retained(lowered: Lowered, decision: Decision, rates: Rates) -> Retained:
    found = _joint(lowered, decision, rates.fused)
    local = Local((), ()) if found is None else _Reader(found, lowered, decision, rates).local()
    entering = {name: int(name.removeprefix("x")) for name in local.fixed}
    factored = decision.context.segmented.factored
    return Retained(found, local, entering, exported(lowered), lambda node: factored.base(node)[0])


def _joint(lowered: Lowered, decision: Decision, fused: bool) -> Joint | None:
    """The joint graph of a segment, None where nothing is differentiated."""
    module = marked(lowered)
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    module.recompile()
    with private.without_values():
        inputs = _inputs(lowered, decision)
        key = key_of(module, inputs, fused)
        known = _JOINTS.get(key)
        if known is not None:
            return known
        traced = private.joint_graph(Kernels(module, "cuda") if fused else module.forward, inputs, fused)
    if traced is None:
        return None
    found = joint(*traced)
    if key is not None:
        _JOINTS[key] = found
    return found


def key_of(module: fx.GraphModule, inputs: list[Tensor], fused: bool) -> Hashable:
    """What decides a joint graph, None where the module holds more than its graph tells."""
    if any(node.op in ("get_attr", "call_module") for node in module.graph.nodes):
        return None
    lines = tuple((node.op, node.name, node.target, str(node.args), str(node.kwargs)) for node in module.graph.nodes)
    return lines, tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in inputs), fused


def _inputs(lowered: Lowered, decision: Decision) -> list[Tensor]:
    """The externals and seeds of a lowered segment, as they arrive."""
    context = decision.context
    factored = context.segmented.factored
    made = []
    for node in lowered.segment.externals:
        dtype, spec = node.meta["val"].dtype, decision.arrival(node)
        if node in decision.storage:
            storage = decision.storage[node]
            spec = storage.spec(context.rank(node), node in context.gradients)
            mixed = factored.program.precision.endswith("-mixed") and dtype == COMPUTE_DTYPE[factored.program.precision]
            dtype = torch.float32 if mixed and not storage.gathered else dtype
        shape = tuple(node.meta["val"].shape) if spec is None else local_shape(factored, node, spec, decision.mesh)
        made.append(torch.empty(shape, dtype=dtype, requires_grad=node in context.gradients))
    seeds = 1 + lowered.host_seeded
    return [*made, *(torch.empty((), dtype=torch.int64) for _ in range(seeds))]


class _Reader:
    """Turns a joint graph into numbers."""

    def __init__(self, found: Joint, lowered: Lowered, decision: Decision, rates: Rates) -> None:
        self.joint, self.rates = found, rates
        self.position = {node: i for i, node in enumerate(found.module.graph.find_nodes(op="placeholder"))}
        externals = lowered.segment.externals
        produced = decision.context.producer
        factored = decision.context.segmented.factored
        self.activations = {i for i, node in enumerate(externals) if factored.base(node)[0] in produced}
        self.order = {node: i for i, node in enumerate(found.module.graph.nodes)}

    def local(self) -> Local:
        nodes = self._reached()
        number = {node: i for i, node in enumerate(nodes)}
        needed = set(self.joint.needed)
        op_names = list(dict.fromkeys(self._op(node) for node in nodes))
        op_number = {name: i for i, name in enumerate(op_names)}
        alone = {name for name in op_names if any(costly(n) for n, r in self.joint.regions.items() if r == name)}
        landing = {node for node in nodes if self._lands(node, alone)}
        values = tuple(Value(self._name(node), float(size_of(node)), op_number[self._op(node)],
                             tuple(number[n] for n in self._inputs_of(node)), node in needed,
                             size_of(node) / self.rates.bytes_per_s if self._writes(node, landing, alone) else 0.0,
                             lands=not self.rates.fused or node in landing) for node in nodes)
        seconds = tuple(self.rates.ops.get(name, 0.0) if name in alone or not self.rates.fused else 0.0
                        for name in op_names)
        fixed = frozenset(self._name(node) for node in nodes if node.op == "placeholder")
        return Local(values, seconds, tuple(self._reads(nodes, number, op_number, alone, landing)), fixed)

    def _reached(self) -> list[fx.Node]:
        """Everything that may be needed, inputs first."""
        seen: dict[fx.Node, None] = {}
        waiting = list(self.joint.needed)
        while waiting:
            node = waiting.pop()
            if node not in seen and self._counts(node):
                seen[node] = None
                waiting += self.joint.read(node) if node.op != "placeholder" else []
        return sorted(seen, key=self.order.__getitem__)

    def _counts(self, node: fx.Node) -> bool:
        """Whether it takes memory that depends on the plan: parameters and what the caller gives are there anyway."""
        return node in self.joint.names or self.position.get(node) in self.activations

    def _name(self, node: fx.Node) -> str:
        return f"x{self.position[node]}" if node.op == "placeholder" else self.joint.names[node]

    def _op(self, node: fx.Node) -> str:
        return self._name(node) if node.op == "placeholder" else self.joint.regions[node]

    def _inputs_of(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in self.joint.read(node) if self._counts(n)] if node.op != "placeholder" else []

    def _lands(self, node: fx.Node, alone: set[str]) -> bool:
        """Whether a kernel of its own makes or reads it."""
        if node.op == "placeholder" or self._op(node) in alone:
            return True
        return any(costly(user) for user in self._users(node))

    def _users(self, node: fx.Node) -> list[fx.Node]:
        """What reads a value or a renaming of it."""
        found, waiting = list[fx.Node](), list(node.users)
        while waiting:
            user = waiting.pop()
            found.append(user)
            waiting += list(user.users) if user in self.joint.renamings else []
        return found

    def _writes(self, node: fx.Node, landing: set[fx.Node], alone: set[str]) -> bool:
        """Whether doing it again costs a write beside the seconds of its op."""
        return self.rates.fused and node in landing and self._op(node) not in alone and node.op != "placeholder"

    def _reads(self, nodes: list[fx.Node], number: dict[fx.Node, int], op_number: dict[str, int], alone: set[str],
               landing: set[fx.Node]) -> list[Read]:
        """What pointwise work reads; what lands is read whether it is made again or not, which `always` says."""
        found: dict[tuple[int, int], Read] = {}
        for node in nodes:
            if not self.rates.fused or node.op == "placeholder" or self._op(node) in alone:
                continue
            for source in self._inputs_of(node):
                if self._op(source) != self._op(node):
                    key = op_number[self._op(node)], number[source]
                    found[key] = Read(*key, size_of(source) / self.rates.bytes_per_s, source in landing)
        return list(found.values())
