"""What the backward of one segment needs of its forward, in numbers; what is kept of it and what is made again.

A `Value` is a tensor that the forward of a segment makes or takes from other segments. Its `name` is what a plan calls
it by: values of one name are kept together or not at all. What the backward needs is followed from there: a value that
is kept is read; one that is not is made again by its op from the op's inputs, which are needed in turn. `fixed` names
are always kept.

    seconds of making again = Σ_{ops that make something again} seconds + Σ_{values made again} write
                              + Σ_{reads (o, u): o makes something again of u, which is kept or `always` read} seconds
    transient               = Σ_{values made again that land} bytes

Pointwise work that is done again in the kernel that reads it has no seconds of its own and does not land in memory: of
it count the reads of what is not made again beside it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of `nbytes`, made by op number `op` from the values `inputs`; `needed` by the backward itself.

    `write` are the seconds of storing it when it is made again beyond those of its op, `lands` whether it is stored.
    """

    name: str
    nbytes: float
    op: int
    inputs: tuple[int, ...] = ()
    needed: bool = False
    write: float = 0.0
    lands: bool = True


@dataclass(frozen=True, slots=True)
class Read:
    """`seconds` that op `op` takes to read `value`, an input of what it makes, where that is not made again beside it,
    or `always`."""

    op: int
    value: int
    seconds: float
    always: bool = False


@dataclass(frozen=True, slots=True)
class Local:
    """One segment on one device: its values in an order in which inputs come first, seconds by op, reads."""

    values: tuple[Value, ...]
    seconds: tuple[float, ...]
    reads: tuple[Read, ...] = ()
    fixed: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that may be kept or not, in order."""
        return tuple(dict.fromkeys(value.name for value in self.values if value.name not in self.fixed))


@dataclass(frozen=True, slots=True)
class Kept:
    """What keeping `names` comes to: the values in memory until the backward, those made again, seconds, bytes.

    `transient` bytes are there while the backward of the segment runs.
    """

    names: tuple[str, ...]
    saved: tuple[int, ...]
    again: tuple[int, ...]
    seconds: float
    nbytes: float
    transient: float


def keep(local: Local, names: frozenset[str]) -> Kept:
    """What keeping `names` comes to; names that nothing needs take no memory, and are left out."""
    saved, again = set[int](), set[int]()
    waiting = [v for v, value in enumerate(local.values) if value.needed]
    while waiting:
        v = waiting.pop()
        if v in saved or v in again:
            continue
        value = local.values[v]
        if value.name in names or value.name in local.fixed:
            saved.add(v)
        else:
            again.add(v)
            waiting += value.inputs
    ops = {local.values[v].op for v in again}
    taking = {(local.values[v].op, u) for v in again for u in local.values[v].inputs}
    seconds = sum(local.seconds[o] for o in ops) + sum(local.values[v].write for v in again)
    seconds += sum(read.seconds for read in local.reads
                   if (read.op, read.value) in taking and (read.always or read.value not in again))
    taken = tuple(name for name in local.names if any(local.values[v].name == name for v in saved))
    return Kept(taken, tuple(sorted(saved)), tuple(sorted(again)), seconds,
                sum(local.values[v].nbytes for v in saved),
                sum(local.values[v].nbytes for v in again if local.values[v].lands))
