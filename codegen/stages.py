"""The stages of a lowered program: which calls each runs and what crosses the cuts.

A stage runs consecutive segments. A value that a later stage reads crosses every cut between; each stage hands it on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from autopar.codegen.executable import Executable
from autopar.core.assembly import Bond
from autopar.core.errors import AutoparError
from autopar.passes.buffers import accesses, buffer_of
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
    """Stage `index`: an executable of its calls alone, the values that come in and that go out."""

    index: int
    executable: Executable
    received: tuple[Port, ...]
    sent: tuple[Port, ...]


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


def bonds_of(executable: Executable) -> tuple[Bond, ...]:
    """The calls that one stage has to run, as they share a buffer that one of them writes."""
    factored = executable.decision.context.segmented.factored
    written = accesses(factored)
    places: dict[fx.Node, list[int]] = {}
    for i, call in enumerate(executable.calls):
        for buffer in dict.fromkeys(buffer_of(node, factored) for node in call.segment.externals):
            if buffer in written:
                places.setdefault(buffer, []).append(i)
    return tuple(Bond(found[0], found[-1], factored.program.sources[buffer.name].name)
                 for buffer, found in places.items() if found[0] < found[-1])


def check_bonds(executable: Executable, bounds: Sequence[int]) -> None:
    """Raises AutoparError where a cut parts what one stage has to run."""
    names = [call.segment.name for call in executable.calls]
    for bond in bonds_of(executable):
        for bound in filter(bond.parted, bounds):
            raise AutoparError(f"a stage begins at segment {names[bound]}, and segments {names[bond.first]} to "
                               f"{names[bond.last]} share buffer {bond.name}, which the forward writes; let one stage "
                               "run them all: plan again")


def stages_of(executable: Executable, bounds: Sequence[int]) -> tuple[Stage, ...]:
    """The stages that hold calls `bounds[j]` to `bounds[j + 1]` - 1 each. Raises AutoparError."""
    check_bonds(executable, bounds)
    ports = [_ports(_crossing(executable, bound), executable.decision) for bound in bounds]
    outputs = frozenset(executable.outputs)
    return tuple(Stage(j, _part(executable, first, last, ports[j + 1], outputs), ports[j], ports[j + 1])
                 for j, (first, last) in enumerate(itertools.pairwise(bounds)))


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


def _part(executable: Executable, first: int, last: int, sent: Sequence[Port],
          outputs: frozenset[fx.Node]) -> Executable:
    calls = executable.calls[first:last]
    made = {node for call in calls for node in call.exports}
    wanted = (*(port.node for port in sent), *(o for o in made if o in outputs))
    results = tuple(dict.fromkeys(node for node in wanted if node in made))
    return replace(executable, calls=calls, freed=executable.freed[first:last], results=results, first=first)
