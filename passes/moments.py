"""When bytes are there: the moments of a step, each the backward of one segment.

Between the forward and the backward of a segment are what its ops make and what it keeps of parameters, from a
parameter's last use back to the optimizer's step is its gradient. Along a stretch of equal segments bytes are linear in
the place, so that its first or its last segment is the fullest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from autopar.core.mesh import Mesh
from autopar.core.sharding import Moment
from autopar.passes.costs import MASTER_BYTES
from autopar.passes.decision import Context
from autopar.passes.layout import itemsize, whole_bytes
from autopar.passes.outline import Key, Outline
from autopar.passes.strategies import Storage


@dataclass(frozen=True, slots=True)
class Uses:
    """The places, among all segments, of the first and the last one that reads a parameter."""

    first: int
    last: int


def uses(context: Context) -> dict[fx.Node, Uses]:
    """Where each parameter is read."""
    found: dict[fx.Node, Uses] = {}
    for place, segment in enumerate(context.segmented.segments):
        for node in segment.externals:
            known = found.get(node)
            found[node] = Uses(known.first if known else place, place)
    return found


def moments(context: Context, outline: Outline, number: Mapping[Key, int]) -> tuple[Moment, ...]:
    """The moments that may be the fullest; `number` gives the node of a key."""
    segments, where = context.segmented.segments, uses(context)
    parameters = {node: number[outline.homes[node]] for node in outline.users}
    reads = [tuple(dict.fromkeys(parameters[n] for n in s.externals if n in parameters)) for s in segments]
    ops = [tuple(number[outline.op_keys[i]] for i in s.ops) for s in segments]
    found, saved = [], Counter[int]()
    gradients = Counter(parameters.values())
    for place, segment in enumerate(segments):
        saved.update((*ops[place], *(n for node, n in parameters.items() if where[node].first == place)))
        inside = 0 < place < len(segments) - 1 and ops[place - 1] == ops[place] == ops[place + 1] \
            and reads[place - 1] == reads[place] == reads[place + 1]
        if not inside:
            found.append(Moment(segment.name, tuple(saved[n] for n in range(len(number))),
                                tuple(gradients[n] for n in range(len(number))), reads[place], ops[place]))
        gradients.subtract(n for node, n in parameters.items() if where[node].last == place)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of one parameter on a device, as `core.sharding.Choice` tells them apart.

    `parameter` and `state` rest all the time, `copy` is what its segment computes with if that is kept for the
    backward, `gradient` comes to rest, `working` is there while its segment runs: what is gathered for it and for the
    next one, and the gradient before it is scattered.
    """

    parameter: float
    state: float
    copy: float
    gradient: float
    working: float


def held(context: Context, node: fx.Node, storage: Storage, mesh: Mesh, state_bytes: float) -> Held:
    """The bytes of a parameter that rests as `storage`; `state_bytes` are an optimizer's for an element."""
    factored, trained = context.segmented.factored, node in context.gradients
    whole = whole_bytes(factored, node)
    used = whole / mesh.extent(storage.spec(context.rank(node), trained=False).axes)
    elements = whole / itemsize(node) / storage.resting_parts(mesh)
    gathered, mixed = bool(storage.gathered), factored.program.precision.endswith("-mixed")
    again = gathered and not storage.kept
    scattered = used / itemsize(node) * MASTER_BYTES if gathered and trained else 0.0
    return Held(elements * MASTER_BYTES, elements * state_bytes if trained else 0.0,
                used if not again and (gathered or mixed) else 0.0, elements * MASTER_BYTES if trained else 0.0,
                (2.0 * used if again else 0.0) + scattered)
