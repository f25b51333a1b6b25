"""How values get from the spec they are emitted in to the specs wanted: `carry` and `pay_once` of `sharding`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

from autopar.core.sharding import Consumer, Flow
from autopar.solver.model import Model, Variable

Take = tuple[tuple[Variable, ...], ...]
"""`take[n][c]` is x[n,c]."""
Pair = tuple[int, int]
Pairs = dict[Pair, list[Variable]]
"""Variables that sum to 1 where a pair (source, target) of specs occurs, and to 0 where it does not."""
Key = TypeVar("Key")


def transport(model: Model, take: Take, flow: Flow, name: str) -> Pairs:
    """The pairs that `flow` pays for, each once."""
    carried = [carry(model, take, flow, consumer, f"{name},{k}") for k, consumer in enumerate(flow.consumers)]
    return pay_once(model, flow, carried, name)


def carry(model: Model, take: Take, flow: Flow, consumer: Consumer, name: str) -> Pairs:
    """e[f,k,s,t]: the consumer has the value brought from the spec it is emitted in to the spec it wants."""
    have, want = take[flow.producer], take[consumer.node]
    sources, targets = _group(flow.sources, have), _group(consumer.targets, want)
    if flow.producer == consumer.node:
        return _finite(model, flow, _group(zip(flow.sources, consumer.targets, strict=True), have))
    if len(sources) == 1 or len(targets) == 1:
        return _finite(model, flow, {(s, t): targets[t] if len(sources) == 1 else sources[s]
                                     for s in sources for t in targets})
    pairs = {(s, t): [model.amount(f"e({name},{s},{t})")] for s in sources for t in targets if _has_way(flow, s, t)}
    for s, taken in sources.items():
        _balance(model, [pairs[s, t][0] for t in targets if (s, t) in pairs], taken)
    for t, taken in targets.items():
        _balance(model, [pairs[s, t][0] for s in sources if (s, t) in pairs], taken)
    return pairs


def pay_once(model: Model, flow: Flow, carried: list[Pairs], name: str) -> Pairs:
    """r[f,s,t], no less than what each consumer has brought; what only one can need is its e."""
    paid: Pairs = {}
    for s, t in dict.fromkeys(pair for pairs in carried for pair in pairs):
        needs = [pairs[s, t] for pairs in carried if (s, t) in pairs]
        if len(needs) == 1:
            paid[s, t] = needs[0]
        elif flow.forward[s][t] or flow.backward[s][t]:
            payment = model.amount(f"r({name},{s},{t})")
            paid[s, t] = [payment]
            for need in needs:
                model.at_least([(payment, 1.0), *((e, -1.0) for e in need)], 0.0)
    return paid


def _group(keys: Iterable[Key], variables: Iterable[Variable]) -> dict[Key, list[Variable]]:
    found: dict[Key, list[Variable]] = {}
    for key, variable in zip(keys, variables, strict=True):
        found.setdefault(key, []).append(variable)
    return found


def _has_way(flow: Flow, source: int, target: int) -> bool:
    return flow.forward[source][target] + flow.backward[source][target] < math.inf


def _finite(model: Model, flow: Flow, pairs: Pairs) -> Pairs:
    """The pairs that have a way; the others are fixed to 0."""
    for pair, variables in pairs.items():
        if not _has_way(flow, *pair):
            model.equal([(x, 1.0) for x in variables], 0.0)
    return {pair: variables for pair, variables in pairs.items() if _has_way(flow, *pair)}


def _balance(model: Model, carried: list[Variable], taken: list[Variable]) -> None:
    model.equal([*((e, 1.0) for e in carried), *((x, -1.0) for x in taken)], 0.0)
