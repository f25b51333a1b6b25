"""Sharding and keeping or making again in one model, where a byte has a price: what any budget leaves at best.

    x[n,c,k]   node n takes choice c, and what its ops make is kept (k = 1) or, where it may be, made again (k = 0)

    L(rate) = min Σ seconds of c + Σ_{k = 0} forward seconds of c + rate · (Σ count · held + Σ_{k = 1} there · saved)
    seconds within a budget ≥ L(rate) − rate · budget        for every rate ≥ 0, in seconds a byte

`there` counts the ops of a node that have run at the last moment. A bound of L(rate) is the dual's (`solver.dual`), and
the choices met on the way are good ones at that price.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from autopar.core.errors import Infeasible
from autopar.core.sharding import Choice, Flow, Instance, price
from autopar.solver.optimise import begin

Variants = tuple[tuple[tuple[int, bool], ...], ...]
"""By node, its choices, each kept or not."""


@dataclass(frozen=True, slots=True)
class Priced:
    """The least that a step comes to at `rate` seconds a byte, or less, and choices that come close to it."""

    rate: float
    least: float
    choices: tuple[int, ...] | None

    def bound(self, budget: float) -> float:
        """No plan within the budget takes fewer seconds."""
        return self.least - self.rate * budget


def priced(instance: Instance, again: frozenset[int], rate: float, solver: str = "cbc") -> Priced:
    """What bytes at `rate` lead to; results of nodes in `again` may be made again."""
    model, variants = relaxed(instance, again, rate)
    try:
        begun = begin(model, solver=solver)
    except Infeasible:
        return Priced(rate, math.inf, None)
    met = begun.bound.choices
    taken = None if met is None else tuple(
        each[v][0] for each, v in zip(variants, begun.reduced.restore(met), strict=True))
    return Priced(rate, begun.bound.seconds, taken)


def relaxed(instance: Instance, again: frozenset[int], rate: float) -> tuple[Instance, Variants]:
    """The instance of L(rate), and what the choices of its nodes stand for."""
    there = instance.moments[-1].saved if instance.moments else (0,) * len(instance.nodes)
    variants = tuple(
        tuple((c, kept) for c, choice in enumerate(node.choices)
              for kept in ((True, False) if n in again and choice.saved else (True,)))
        for n, node in enumerate(instance.nodes))
    nodes = tuple(replace(node, choices=tuple(
        _at(node.choices[c], kept, rate, there[n] / node.count) for c, kept in each))
        for n, (node, each) in enumerate(zip(instance.nodes, variants, strict=True)))
    segments = tuple(replace(segment, flows=tuple(_wider(flow, variants) for flow in segment.flows))
                     for segment in instance.segments)
    return Instance(nodes, segments), variants


def _at(choice: Choice, kept: bool, rate: float, there: float) -> Choice:
    """A choice whose bytes are paid for beside its optimizer step, which nothing hides behind."""
    paid = rate * (choice.nbytes + (there * choice.saved if kept else 0.0))
    return Choice(choice.name, choice.forward, choice.backward + (0.0 if kept else choice.forward),
                  choice.optimizer + paid)


def _wider(flow: Flow, variants: Variants) -> Flow:
    consumers = tuple(replace(consumer, targets=tuple(consumer.targets[c] for c, _ in variants[consumer.node]))
                      for consumer in flow.consumers)
    return replace(flow, sources=tuple(flow.sources[c] for c, _ in variants[flow.producer]), consumers=consumers)


def hull(instance: Instance, again: frozenset[int], factors: tuple[float, ...], solver: str = "cbc",
         ) -> tuple[Priced, ...]:
    """What rates of all sizes lead to: `factors` times the seconds over the bytes of the step that is fastest."""
    free = priced(instance, again, 0.0, solver)
    if free.choices is None:
        return (free,)
    fastest = price(replace(instance, budget=math.inf), free.choices)
    scale = fastest.seconds / (fastest.nbytes or 1.0)
    return free, *(priced(instance, again, scale * factor, solver) for factor in factors)


def bound_within(prices: tuple[Priced, ...], budget: float) -> float:
    """The largest of the bounds."""
    return max(each.bound(budget) for each in prices)
