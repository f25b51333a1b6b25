"""What the backward of one segment needs of its forward, in numbers; what is kept of it and what is made again.

A `Value` is a tensor that the forward of a segment makes. Its `name` is what a plan calls it by: values of one name
are kept together or not at all. What the backward needs is followed from there: a value that is kept is read; one that
is not is made again by its op from the op's inputs, which are needed in turn. Inputs of the segment are always there.

    seconds of making again = Σ_{ops made again} seconds + Σ_{values made again} write
                              + Σ_{reads (o, u): o made again, u not} read

A read of a value that is made again beside its reader in one kernel costs nothing, nor does its write: `write` is 0
and `Read`s are told only for values that no kernel of its own (a matmul, attention) reads.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of `nbytes`, made by op number `op` from the values `inputs`; `needed` by the backward itself.

    `write` are the seconds of storing it when it is made again. `crossing` ones leave the segment: whoever takes them
    may hold them anyhow.
    """

    name: str
    nbytes: float
    op: int
    inputs: tuple[int, ...] = ()
    needed: bool = False
    write: float = 0.0
    crossing: int | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """`seconds` that op `op` takes to read `value` from memory, where it is not made again beside it."""

    op: int
    value: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Local:
    """One segment on one device: its values in an order in which inputs come first, seconds by op, reads.

    `entering` are the numbers of the inputs, no parameters among them, that the backward needs whatever is kept, with
    their bytes; `fixed` names are never made again.
    """

    values: tuple[Value, ...]
    seconds: tuple[float, ...]
    reads: tuple[Read, ...] = ()
    entering: tuple[tuple[int, float], ...] = ()
    fixed: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that may be kept, in order."""
        return tuple(dict.fromkeys(value.name for value in self.values))


@dataclass(frozen=True, slots=True)
class Kept:
    """What keeping `names` comes to: the values in memory until the backward, those made again, seconds, bytes.

    `transient` bytes are there while the backward of the segment runs.
    """

    names: frozenset[str]
    saved: tuple[int, ...]
    again: tuple[int, ...]
    seconds: float
    nbytes: float
    transient: float


def keep(local: Local, names: frozenset[str]) -> Kept:
    """What keeping `names` comes to; names that nothing needs take no memory."""
    saved, again = set[int](), set[int]()
    waiting = [v for v, value in enumerate(local.values) if value.needed]
    while waiting:
        v = waiting.pop()
        if v in saved or v in again:
            continue
        value = local.values[v]
        if value.name in names:
            saved.add(v)
        else:
            again.add(v)
            waiting += value.inputs
    ops = {local.values[v].op for v in again}
    seconds = sum(local.seconds[o] for o in ops) + sum(local.values[v].write for v in again)
    seconds += sum(read.seconds for read in local.reads if read.op in ops and read.value not in again)
    return Kept(names, tuple(sorted(saved)), tuple(sorted(again)), seconds,
                sum(local.values[v].nbytes for v in saved),
                sum(local.values[v].nbytes for v in again if local.values[v].write))
