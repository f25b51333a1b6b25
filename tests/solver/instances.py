"""Sharding instances: small random ones with their brute-force twin, and large ones."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

from autopar.core.sharding import Choice, Consumer, Flow, Instance, Moment, Node, Segment, price

Table = tuple[tuple[float, ...], ...]
INF = math.inf
EXACT = 1e-9
"""The relative difference allowed between optima."""


def random_table(rng: random.Random, rows: int, columns: int, infinite: float) -> Table:
    def seconds() -> float:
        return INF if rng.random() < infinite else rng.choice((0.0, 1e-4, 10 ** rng.uniform(-6, 0)))
    return tuple(tuple(seconds() for _ in range(columns)) for _ in range(rows))


def random_flow(rng: random.Random, nodes: tuple[Node, ...], name: str) -> Flow:
    """A value with one to three consumers, its own producer perhaps among them."""
    producer, rows, columns = rng.randrange(len(nodes)), rng.randint(1, 4), rng.randint(1, 4)
    consumers = tuple(Consumer(n, tuple(rng.randrange(columns) for _ in nodes[n].choices))
                      for n in rng.choices(range(len(nodes)), k=rng.choice((1, 1, 2, 3))))
    infinite = rng.choice((0.0, 0.0, 0.0, 0.15))
    forward, backward = (random_table(rng, rows, columns, infinite) for _ in range(2))
    sources = tuple(rng.randrange(rows) for _ in nodes[producer].choices)
    return Flow(name, producer, sources, consumers, forward, backward, rng.random() < 0.4)


def random_choice(rng: random.Random, name: str) -> Choice:
    forward, backward, optimizer = (rng.choice((0.0, 1e-3, 10 ** rng.uniform(-6, -1))) for _ in range(3))
    nbytes = rng.randrange(100) * 10 ** rng.randrange(9) + rng.randrange(3)
    saved, gradient, working = (float(rng.choice((0, rng.randrange(100) * 10 ** rng.randrange(9)))) for _ in range(3))
    return Choice(name, forward, backward, optimizer, float(nbytes), saved, gradient, working)


def random_moment(rng: random.Random, nodes: tuple[Node, ...], name: str) -> Moment:
    """A moment with any of the nodes as parameters and ops."""
    def counts() -> tuple[int, ...]:
        return tuple(rng.randint(0, node.count) for node in nodes)
    def some() -> tuple[int, ...]:
        return tuple(rng.sample(range(len(nodes)), rng.randrange(len(nodes))))
    return Moment(name, counts(), counts(), some(), some())


def random_instance(seed: int) -> Instance:
    """2 to 6 nodes of 1 to 4 choices; in two of three the budget is the bytes of a random solution, less 0 or 1."""
    rng = random.Random(seed)
    nodes = tuple(Node(f"n{n}", tuple(random_choice(rng, f"c{c}") for c in range(rng.randint(1, 4))), rng.randint(1, 3))
                  for n in range(rng.randint(2, 6)))
    segments = tuple(
        Segment(f"s{g}", rng.randint(1, 24), tuple(rng.sample(range(len(nodes)), rng.randint(1, len(nodes)))),
                tuple(random_flow(rng, nodes, f"f{g}{f}") for f in range(rng.randint(0, 4))))
        for g in range(rng.randint(1, 3)))
    moments = tuple(random_moment(rng, nodes, f"m{m}") for m in range(rng.choice((0, 0, 1, 2, 3))))
    instance = Instance(nodes, segments, moments=moments)
    taken = tuple(rng.randrange(len(node.choices)) for node in nodes)
    return replace(instance, budget=rng.choice((INF, price(instance, taken).nbytes - rng.randrange(2))))


def least_seconds(instance: Instance) -> float:
    """The optimum by trying every choice for every node; infinite when nothing fits."""
    every = (price(instance, taken) for taken in itertools.product(*(range(len(n.choices)) for n in instance.nodes)))
    return min((p.seconds for p in every if p.nbytes <= instance.budget), default=INF)


def least_held(instance: Instance) -> float:
    """The smallest budget with a solution, by trying every choice for every node; infinite when there is no way."""
    every = (price(instance, taken) for taken in itertools.product(*(range(len(n.choices)) for n in instance.nodes)))
    return min((p.nbytes for p in every if p.seconds < INF), default=INF)


def tangled(size: int, width: int) -> Instance:
    """`size` nodes of `width` choices with three times as many flows between any two of them: no order helps."""
    rng = random.Random(size)
    nodes = tuple(Node(f"n{n}", tuple(Choice(f"c{c}", rng.random(), rng.random()) for c in range(width)))
                  for n in range(size))
    def flow(name: str) -> Flow:
        producer, consumer = rng.sample(range(size), 2)
        way, every = tuple(tuple(rng.random() for _ in range(width)) for _ in range(width)), tuple(range(width))
        return Flow(name, producer, every, (Consumer(consumer, every),), way, way)
    flows = tuple(flow(f"f{f}") for f in range(3 * size))
    return Instance(nodes, (Segment("s", 1, tuple(range(size)), flows),))


def layered(depth: int, width: int) -> Instance:
    """A chain of `depth` nodes of `width` choices with flows to the next node and to one of the next three."""
    rng, specs = random.Random(depth), 10
    nodes = tuple(Node(f"n{n}", tuple(Choice(f"c{c}", rng.uniform(1e-4, 1e-3), rng.uniform(1e-4, 1e-3),
                                             nbytes=float(rng.randrange(10 ** 9))) for c in range(width)))
                  for n in range(depth))
    wants = [tuple(rng.randrange(specs) for _ in range(width)) for _ in nodes]
    way = tuple(tuple(1e-4 * abs(s - t) for t in range(specs)) for s in range(specs))
    pairs = [(n, min(depth - 1, n + step)) for n in range(depth - 1) for step in (1, rng.randint(1, 3))]
    flows = tuple(Flow(f"f{p}{c}", p, wants[p], (Consumer(c, wants[c]),), way, way) for p, c in pairs)
    return Instance(nodes, (Segment("s", 12, tuple(range(depth)), flows),))
