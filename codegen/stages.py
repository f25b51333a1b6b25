"""The stages of a lowered program: which calls each runs, what crosses the cuts, which gradients are summed later.

A stage runs consecutive segments. A value that a later stage reads crosses every cut between; each stage hands it on.
Sums of parameters' gradients over the ranks of a stage are linear, so that they are taken out of the segments where all
uses of a parameter agree on them, and made once a step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from autopar.codegen.collectives import ReduceGradients
from autopar.codegen.communicator import Axes
from autopar.codegen.executable import Call, Executable
from autopar.core.errors import AutoparError
from autopar.passes.decision import Decision
from autopar.passes.functional import value_of
from autopar.passes.layout import local_shape


@dataclass(frozen=True, slots=True, eq=False)
class Port:
    """A value that crosses a cut: its local shape and dtype, and whether a gradient comes back for it."""

    node: fx.Node
    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool

    @property
    def nbytes(self) -> int:
        """Bytes of it on one device."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Stage:
    """Stage `index`: an executable of its calls alone, the values that come in and that go out.

    `sums` has for each parameter of its place the axes over which its gradient is summed once a step.
    """

    index: int
    executable: Executable
    received: tuple[Port, ...]
    sent: tuple[Port, ...]
    sums: dict[str, Axes]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that it reads."""
        return tuple(dict.fromkeys(name for call in self.executable.calls for name in call.parameters if name))


def cut_at(starts: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    """Where stages begin that start with the segments called `starts`, and where the last ends.

    Raises AutoparError for names that are none, or not in order.
    """
    lacking = [name for name in starts if name not in names]
    if lacking:
        raise AutoparError(f"stages begin at segments {', '.join(lacking)}, which the program does not have; its "
                           f"segments are {', '.join(names)}")
    places = [names.index(name) for name in starts]
    if places[:1] != [0] or places != sorted(set(places)):
        raise AutoparError(f"stages begin at segments {', '.join(starts)}, needed are ones in order, {names[0]} first")
    return (*places, len(names))


def stages_of(executable: Executable, bounds: Sequence[int], places: int) -> tuple[Stage, ...]:
    """The stages that hold calls `bounds[j]` to `bounds[j + 1]` - 1 each, stage j at place j modulo `places`."""
    decision = executable.decision
    crossing = [_crossing(executable, bound) for bound in bounds]
    parts = list(itertools.pairwise(bounds))
    outputs, found = frozenset(executable.outputs), dict[int, Stage]()
    for place in range(places):
        mine = list(enumerate(parts))[place::places]
        calls, sums = _without_sums([call for _, (a, b) in mine for call in executable.calls[a:b]])
        left = iter(calls)
        for j, (a, b) in mine:
            part = _part(executable, a, tuple(itertools.islice(left, b - a)), crossing[j + 1], outputs)
            found[j] = Stage(j, part, _ports(crossing[j], decision), _ports(crossing[j + 1], decision), sums)
    return tuple(found[j] for j in range(len(parts)))


def ports_behind(executable: Executable) -> list[tuple[Port, ...]]:
    """What would cross a cut behind each call."""
    return [_ports(_crossing(executable, place + 1), executable.decision) for place in range(len(executable.calls))]


def _crossing(executable: Executable, place: int) -> tuple[fx.Node, ...]:
    """The values made before call `place` that it or a later one reads, or the program returns."""
    before = {node for call in executable.calls[:place] for node in call.exports}
    read = [node for call in executable.calls[place:] for node in call.segment.externals]
    return tuple(dict.fromkeys(node for node in [*read, *executable.outputs] if node in before))


def _ports(nodes: Sequence[fx.Node], decision: Decision) -> tuple[Port, ...]:
    found = []
    for node in nodes:
        value, spec = value_of(node), decision.arrival(node)
        assert value is not None and spec is not None, f"{node} has no spec"
        shape = local_shape(decision.context.segmented.factored, node, spec, decision.mesh)
        found.append(Port(node, shape, value.dtype, node in decision.context.gradients))
    return tuple(found)


def _part(executable: Executable, first: int, calls: tuple[Call, ...], sent: Sequence[fx.Node],
          outputs: frozenset[fx.Node]) -> Executable:
    made = {node for call in calls for node in call.exports}
    results = tuple(dict.fromkeys(node for node in (*sent, *(o for o in made if o in outputs)) if node in made))
    freed = executable.freed[first:first + len(calls)]
    return replace(executable, calls=calls, freed=freed, results=results, first=first)


# Sums of gradients

def _without_sums(calls: Sequence[Call]) -> tuple[tuple[Call, ...], dict[str, Axes]]:
    """The calls without the sums that can be made later, and these by parameter."""
    asked: dict[str, set[Axes | None]] = {}
    for call in calls:
        for name, axes in _sums_in(call).items():
            asked.setdefault(name, set()).add(axes)
    kept = _kept(calls, {name for name, found in asked.items() if len(found) > 1 or None in found})
    made = {id(call.lowered): replace(call.lowered, module=_stripped(call.lowered.module))
            for call in calls if id(call.lowered) not in kept}
    lowered = [made.get(id(call.lowered), call.lowered) for call in calls]
    later = {name: axes for call in calls if id(call.lowered) in made for name, axes in _sums_in(call).items() if axes}
    return tuple(replace(call, lowered=low, run=low.module) for call, low in zip(calls, lowered, strict=True)), later


def _kept(calls: Sequence[Call], differing: set[str]) -> set[int]:
    """The lowered segments that keep their sums: those of parameters whose uses differ, and of all others there."""
    kept: set[int] = set()
    while True:
        more = {id(call.lowered) for call in calls if differing.intersection(_summed(call))}
        if more == kept:
            return kept
        kept = more
        differing = differing | {name for call in calls if id(call.lowered) in kept for name in _summed(call)}


def _summed(call: Call) -> list[str]:
    return [name for name, axes in _sums_in(call).items() if axes != ()]


def _sums_in(call: Call) -> dict[str, Axes | None]:
    """Over which axes a call sums the gradient of each parameter; None where uses differ."""
    nodes = [n for n in call.lowered.module.graph.nodes if n.op == "placeholder"]
    found: dict[str, Axes | None] = {}
    for name, node in zip(call.parameters, nodes, strict=False):
        if name:
            axes = {_axes(user, call) for user in node.users}
            found[name] = axes.pop() if len(axes) == 1 else None if axes else ()
    return found


def _axes(user: fx.Node, call: Call) -> Axes:
    module = call.lowered.module.get_submodule(str(user.target)) if user.op == "call_module" else None
    return module.axes if isinstance(module, ReduceGradients) else ()


def _stripped(module: fx.GraphModule) -> fx.GraphModule:
    """The same without sums of gradients."""
    graph = fx.Graph()
    kept: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, kept))
    made = fx.GraphModule(module, graph, module._get_name())
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(made.get_submodule(str(node.target)), ReduceGradients):
            for part in list(node.users):
                part.replace_all_uses_with(node.args[0][part.args[1]])
                graph.erase_node(part)
            graph.erase_node(node)
    made.recompile()
    return made
