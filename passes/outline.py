"""What a sharding problem owes to the program alone: what is decided together, and which values flow where.

A key names what is decided once: the op at one place of a class of segments, the parameter that they read at one
place, a parameter that is read at several, the program's output.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

from torch import fx

from autopar.core.reshard import Cargo
from autopar.core.spec import State
from autopar.passes.decision import Context, cargo_of
from autopar.passes.ops import Op, OpOperand, is_parameter
from autopar.passes.segments import Segment, plain_arguments

Key = tuple[object, ...]
OUTPUT: Key = ("output",)


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """What takes a value: an axis that is assigned k by `key` must do `states[k]` to it."""

    key: Key
    states: dict[str, State]


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """`value` on its way into a run: an axis that the op `producer` assigns k does `states[k]` to it.

    Without `states`, `producer` is a parameter.
    """

    value: fx.Node
    cargo: Cargo
    producer: Key
    states: dict[str, State] | None
    readers: tuple[Reader, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """`count` segments of one class that read from the same ops and so many `parameters`; `ops` in order, values that
    arrive."""

    name: str
    count: int
    ops: tuple[Key, ...]
    arrivals: tuple[Arrival, ...]
    parameters: int


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """`ops` and `parameters` are what is decided, as one of the equal ones and how many they are.

    `op_keys[i]` decides op i of the program, `homes[n]` parameter n, which `users` use.
    """

    ops: dict[Key, tuple[Op, int]]
    parameters: dict[Key, tuple[fx.Node, int]]
    op_keys: tuple[Key, ...]
    homes: dict[fx.Node, Key]
    users: dict[fx.Node, list[tuple[Op, OpOperand]]]
    runs: tuple[Run, ...]


_KNOWN: WeakKeyDictionary[Context, Outline] = WeakKeyDictionary()


def outline(context: Context) -> Outline:
    """The outline of a program, made once."""
    if context not in _KNOWN:
        _KNOWN[context] = _Tracer(context).outline()
    return _KNOWN[context]


@dataclass(frozen=True, eq=False)
class _Tracer:
    """Works out what is equal and where values come from."""

    context: Context

    def outline(self) -> Outline:
        segmented, count = self.context.segmented, self.counts
        ops = {self.op_keys[i]: (segmented.ops[i], count[s.class_id])
               for s in segmented.representatives.values() for i in s.ops}
        times = Counter(self.homes[node] for node in self.users)
        first = {self.homes[node]: node for node in reversed(self.users)}
        parameters = {self.homes[node]: (first[self.homes[node]], times[self.homes[node]]) for node in self.users}
        return Outline(ops, parameters, self.op_keys, self.homes, self.users, tuple(map(self._run, self._variants())))

    @cached_property
    def counts(self) -> Counter[int]:
        """How many segments each class has."""
        return Counter(s.class_id for s in self.context.segmented.segments)

    @cached_property
    def users(self) -> dict[fx.Node, list[tuple[Op, OpOperand]]]:
        """Every parameter that is used, with its users."""
        return self.context.parameters()

    @cached_property
    def op_keys(self) -> tuple[Key, ...]:
        """What decides each op."""
        keys = {i: ("op", s.class_id, i - s.first) for s in self.context.segmented.segments for i in s.ops}
        return tuple(keys[i] for i in range(len(keys)))

    @cached_property
    def homes(self) -> dict[fx.Node, Key]:
        """Parameters at one place of equal segments are decided together, shared ones alone."""
        first: dict[fx.Node, tuple[int, int]] = {}
        for segment in self.context.segmented.segments:
            for place, node in enumerate(segment.externals):
                if is_parameter(node, self.context.segmented.factored):
                    first.setdefault(node, (segment.class_id, place))
        times = Counter(n for s in self.context.segmented.segments for n in s.externals if n in first)
        places = Counter(first.values())
        return {node: ("parameter", *key) if places[key] == self.counts[key[0]] and times[node] == 1
                else ("parameter", node.name) for node, key in first.items()}

    def _variants(self) -> list[list[Segment]]:
        """Segments grouped by class and by who makes what they read."""
        groups: dict[Key, list[Segment]] = {}
        for segment in self.context.segmented.segments:
            groups.setdefault((segment.class_id, *map(self._origin, segment.externals)), []).append(segment)
        return list(groups.values())

    def _origin(self, node: fx.Node) -> object:
        aliases, renamings = self.context.segmented.factored.aliases, []
        while node in aliases and node not in self.context.producer:
            renamings.append((str(node.target), plain_arguments(node)))
            node = aliases[node].source
        if node in self.context.producer:
            return self.op_keys[self.context.producer[node]], self._result(node)[1], *renamings
        return self.homes.get(node, "given"), *renamings

    def _result(self, node: fx.Node) -> tuple[Op, int]:
        """The op that makes `node`, and which of its results that is."""
        op = self.context.segmented.ops[self.context.producer[node]]
        return op, [r.node for r in op.results].index(node)

    def _run(self, group: list[Segment]) -> Run:
        """What arrives in the first segment of a group stands for all."""
        segment, factored = group[0], self.context.segmented.factored
        readers: dict[fx.Node, list[Reader]] = {}
        for index in segment.ops:
            op, key = self.context.segmented.ops[index], self.op_keys[index]
            for operand in op.operands:
                port = segment.port(operand.node, factored)
                base, place = factored.base(port)
                if base in self.context.producer or base in self.users:
                    states = self.context.wanted_states(op, operand, place)
                    readers.setdefault(port, []).append(Reader(key, states))
        for base in self._outputs(segment):
            readers.setdefault(base, []).append(Reader(OUTPUT, {"R": "R"}))
        arrivals = tuple(self._arrival(port, tuple(found)) for port, found in readers.items())
        parameters = sum(node in self.users for node in segment.externals)
        return Run(segment.name, len(group), tuple(self.op_keys[i] for i in segment.ops), arrivals, parameters)

    def _outputs(self, segment: Segment) -> list[fx.Node]:
        factored = self.context.segmented.factored
        made = {r.node for i in segment.ops for r in self.context.segmented.ops[i].results}
        bases = [factored.base(o)[0] for o in factored.program.whole_outputs()]
        return [base for base in dict.fromkeys(bases) if base in made]

    def _arrival(self, port: fx.Node, readers: tuple[Reader, ...]) -> Arrival:
        base, place = self.context.segmented.factored.base(port)
        cargo = cargo_of(self.context, port)
        if base in self.users:
            return Arrival(port, cargo, self.homes[base], None, readers)
        op, number = self._result(base)
        states = self.context.emitted_states(op, op.results[number], place)
        return Arrival(port, cargo, self.op_keys[self.context.producer[base]], states, readers)
