"""How parameters rest, as specs over the dims they are stored in."""

from __future__ import annotations

from torch import fx

from autopar.core.spec import Spec
from autopar.passes.decision import Decision
from autopar.passes.strategies import storage_dims


def resting_spec(decision: Decision, node: fx.Node) -> str:
    """What cuts the parameter `node` at rest, axes that it is gathered over aside."""
    states = decision.storage[node].states
    dims = storage_dims(decision.context.segmented.factored, node)
    cut = (tuple(a for a, state in enumerate(states) if isinstance(state, int) and state in dim) for dim in dims)
    return str(Spec(tuple(cut)))
