"""What of a program's results its backward must find again, told from one way to run it, for a bound of all ways.

What a segment hands to others is held; a result that the backward needs and that a kernel of its own makes is held or
made again at that kernel's seconds; all else is taken to cost nothing. A pointwise value that the backward needs and
that is made of such results stands for one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from autopar.codegen.retained import Retained
from autopar.codegen.ways import Ways
from autopar.core.checkpoint import Local
from autopar.core.sharding import Instance
from autopar.passes.problem import Problem


@dataclass(frozen=True, slots=True)
class Needs:
    """By number in its segment, the ops whose results are held, those held or made again; `least[u]` is an op of
    which a result may be held in the place of u's."""

    held: frozenset[int]
    again: frozenset[int]
    least: dict[int, int]


def needs_of(retained: Retained) -> Needs:
    """What the backward of a segment must find again."""
    local = retained.local
    held = frozenset(_op(name) for name in retained.leaving if _is_result(name))
    again, least = set[int](), dict[int, int]()
    for value in local.values:
        if value.needed and _is_result(value.name) and local.seconds[value.op] > 0.0:
            again.add(_op(value.name))
    for v, value in enumerate(local.values):
        if value.needed and _is_result(value.name) and _op(value.name) not in held | again:
            source = next((u for u in _sources(local, v) if u not in held | again), None)
            if source is not None:
                again.add(source)
                least[source] = _op(value.name)
    return Needs(held, frozenset(again) - held, least)


def _sources(local: Local, v: int) -> Iterator[int]:
    """The ops of kernels of their own whose results making `v` again takes, through pointwise work."""
    for u in local.values[v].inputs:
        value = local.values[u]
        if value.name in local.fixed or not _is_result(value.name):
            continue
        if local.seconds[value.op] > 0.0:
            yield _op(value.name)
        elif not value.needed:
            yield from _sources(local, u)


def _is_result(name: str) -> bool:
    return name.replace(".", "", 1).isdigit()


def _op(name: str) -> int:
    return int(name.partition(".")[0])


def trimmed(problem: Problem, ways: Ways) -> tuple[Instance, frozenset[int]]:
    """The instance with no more bytes saved than any way to run it must hold, and the nodes that may run again."""
    held, again, least = set[int](), set[int](), dict[int, int]()
    seen: dict[int, list[str]] = {}
    for call, retained in zip(ways.executable.calls, ways.retained, strict=True):
        needs, ops = needs_of(retained), [problem.op_nodes[i] for i in call.segment.ops]
        for j, n in enumerate(ops):
            kind = "held" if j in needs.held else "again" if j in needs.again else "free"
            seen.setdefault(n, []).append(kind)
            if j in needs.least:
                least[n] = ops[needs.least[j]]
    for n, kinds in seen.items():
        if "free" not in kinds:
            (again if "again" in kinds else held).add(n)
    gathered = {n: tuple(bool(storage.gathered) for storage in stored) for n, stored in problem.stored.items()}

    def saved(n: int, c: int, nbytes: float) -> float:
        if n in gathered:
            return nbytes * gathered[n][c]
        if n not in held | again:
            return 0.0
        instead = problem.instance.nodes[least[n]].choices if n in least else ()
        return min(nbytes, *(other.saved for other in instead), nbytes)

    nodes = tuple(replace(node, choices=tuple(replace(choice, saved=saved(n, c, choice.saved))
                                              for c, choice in enumerate(node.choices)))
                  for n, node in enumerate(problem.instance.nodes))
    return replace(problem.instance, nodes=nodes), frozenset(again)
