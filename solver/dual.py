"""The prices at which a network's least sum is largest, and with them the choices that no optimum takes.

    maximise θ     θ ≤ Σ_{g,p} count · ((1 − μ[g,p]) · visible_k + (μ[g,p] + INTERFERENCE) · hidden_k) + optimizer_k
                       + Σ_r λ_r · (bytes_k,r − budget)                               for every cut k
                   0 ≤ μ ≤ 1, λ ≥ 0

A cut is made by choices that were least at some prices (Kelley's cutting planes), tried half way between the best
prices so far and the model's, which keeps them from swinging (in-out separation: Ben-Ameur and Neto 2007). Whatever
node and choice has no sum with it, at the best prices, below the seconds of a known solution is in no better solution.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.core.sharding import INTERFERENCE, PHASES, Instance, price
from autopar.solver.elimination import Array
from autopar.solver.model import Model, Terms, Variable
from autopar.solver.network import Cut, Network, Prices, cut, network

MOST_CUTS = 40
CLOSE = 1e-7
"""The relative distance to the model's θ, or to a known solution, at which prices are good enough."""
STALLED, PATIENCE = 1e-4, 4
"""The relative gain below which a cut adds nothing to speak of, and how many of these are borne."""
ROUNDING = 1e-9
"""How far above a solution's seconds, relatively, a bound must be to rule a choice out."""


@dataclass(frozen=True, eq=False)
class Bound:
    """What the dual proved: no solution takes fewer than `seconds`; `choices` is the best one seen, None for none."""

    net: Network
    seconds: float
    prices: Prices
    cuts: tuple[Cut, ...]
    choices: tuple[int, ...] | None

    @cached_property
    def marginals(self) -> tuple[Array, ...]:
        """The least sum with each choice of each node at the prices."""
        return self.net.at(self.prices).marginals()


def raise_bound(instance: Instance, solver: str, enough: float = math.inf, limit_s: float | None = None) -> Bound:
    """The largest lower bound, or close to it, and the best choices met on the way.

    A bound of `enough` seconds will do, and so will what is found within `limit_s`.
    """
    end = math.inf if limit_s is None else time.perf_counter() + limit_s
    net = network(instance)
    prices = free(net)
    best, cuts, seen = -math.inf, list[Cut](), list[tuple[float, tuple[int, ...]]]()
    at, waited = prices, 0
    for _ in range(MOST_CUTS):
        found = net.at(at)
        value = net.value(found, at)
        if math.isinf(value):
            return Bound(net, value, at, tuple(cuts), None)
        choices = found.choices()
        priced = price(instance, choices)
        if math.isfinite(priced.seconds):  # where tables were split, choices may be least that have no way
            cuts.append(cut(net, choices))
            if priced.nbytes <= instance.budget:
                seen.append((priced.seconds, choices))
        waited = 0 if value > best + STALLED * abs(best) else waited + 1
        if value > best:
            best, prices = value, at
        if min((enough, *(seconds for seconds, _ in seen))) - best <= CLOSE * best or time.perf_counter() > end:
            break
        if not cuts:
            break
        aim, most = _aim(net, cuts, solver)
        if most - best <= CLOSE * best or (waited >= PATIENCE and seen):
            break
        at = _between(prices, aim, 0.5)
    return Bound(net, best, prices, tuple(cuts), min(seen)[1] if seen else None)


def free(net: Network) -> Prices:
    """Bytes for nothing, and nothing of parameter communication but its interference."""
    return Prices(np.zeros((len(net.instance.segments), len(PHASES))), np.zeros(len(net.bytes_of.table)))


def _between(prices: Prices, aim: Prices, share: float) -> Prices:
    return Prices(prices.hidden + share * (aim.hidden - prices.hidden), prices.byte + share * (aim.byte - prices.byte))


def survivors(bound: Bound, seconds: float) -> tuple[tuple[int, ...], ...]:
    """The choices of each node that a solution of at most `seconds` may take."""
    most = seconds * (1.0 + ROUNDING) + bound.net.allowance(bound.prices)
    return tuple(tuple(int(c) for c in np.flatnonzero(least <= most + ROUNDING * abs(most)))
                 for least in bound.marginals)


def _aim(net: Network, cuts: list[Cut], solver: str) -> tuple[Prices, float]:
    """The prices at which the least of the cuts is largest, and that value."""
    instance = net.instance
    unit = max(_seconds(net, made) for made in cuts) or 1.0
    room = abs(instance.budget) if math.isfinite(instance.budget) else 1.0
    model = Model("dual")
    theta = model.amount("theta")
    hidden = {(g, p): model.amount(f"m({g},{p})") for g, segment in enumerate(instance.segments) for p in range(2)
              if any(flow.parameter for flow in segment.flows)}
    for share in hidden.values():
        model.at_most([(share, 1.0)], 1.0)
    byte = [model.amount(f"l({r})") for r in range(len(net.bytes_of.table))]
    for each in byte:
        model.at_most([(each, 1.0)], 100.0)
    for made in cuts:
        over = (made.nbytes - instance.budget) / room if byte else ()
        terms = [(theta, 1.0), *((x, -float(o)) for x, o in zip(byte, over, strict=True)),
                 *_shares(net, made, hidden, unit)]
        model.at_most(terms, _seconds(net, made) / unit)
    model.minimise([(theta, -1.0)])
    values = model.solve(solver).values
    shares = np.zeros((len(instance.segments), len(PHASES)))
    for (g, p), share in hidden.items():
        shares[g, p] = min(1.0, max(0.0, values[share.name]))
    rates = np.array([max(0.0, values[each.name]) * unit / room for each in byte])
    return Prices(shares, rates), values["theta"] * unit


def _shares(net: Network, made: Cut, hidden: dict[tuple[int, int], Variable], unit: float) -> Terms:
    """The coefficients of μ: parameter communication less what hides it."""
    for (g, p), share in hidden.items():
        part = made.parts[g][p]
        yield share, net.instance.segments[g].count * (part.work + part.inline - part.hidden) / unit


def _seconds(net: Network, made: Cut) -> float:
    """What a cut costs where parameter communication only interferes."""
    return made.optimizer + sum(segment.count * (part.work + part.inline + INTERFERENCE * part.hidden)
                                for segment, parts in zip(net.instance.segments, made.parts, strict=True)
                                for part in parts)
