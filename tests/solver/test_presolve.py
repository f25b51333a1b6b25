"""Presolved sharding instances have the same optimum, and their choices the same price."""

from __future__ import annotations

import itertools

import pytest

from autopar.core.sharding import Choice, Consumer, Flow, Instance, Node, Segment, price
from autopar.solver.presolve import presolve
from tests.solver.instances import EXACT, least_seconds, random_instance


def test_presolve_keeps_the_optimum() -> None:
    smaller = 0
    for instance in map(random_instance, range(300)):
        reduced = presolve(instance)
        best = least_seconds(reduced.instance)
        assert best == pytest.approx(least_seconds(instance), rel=EXACT)
        for taken in itertools.islice(itertools.product(*map(range, map(len, reduced.kept))), 20):
            before, after = price(instance, reduced.restore(taken)), price(reduced.instance, taken)
            assert (after.seconds, after.nbytes) == pytest.approx((before.seconds, before.nbytes), rel=EXACT)
        smaller += sum(map(len, reduced.kept)) < sum(len(node.choices) for node in instance.nodes)
    assert smaller > 30


def test_equal_and_unused_specs_go() -> None:
    """Of four specs the second equals the first, and none emits the last."""
    way = ((0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 1.0, 0.0), (2.0, 2.0, 0.0, 0.0), (9.0, 9.0, 9.0, 9.0))
    nodes = tuple(Node(name, tuple(Choice(str(c), float(c), nbytes=3.0 - c) for c in range(3))) for name in "ab")
    flow = Flow("f", 0, (0, 1, 2), (Consumer(1, (0, 1, 2)),), way, way)
    small = presolve(Instance(nodes, (Segment("s", 1, (0, 1), (flow,)),), 1e9)).instance.segments[0].flows[0]
    assert (small.sources, small.consumers[0].targets) == ((0, 0, 1), (0, 0, 1))
    assert small.forward == ((0.0, 1.0), (2.0, 0.0))


@pytest.mark.parametrize(("budget", "kept"), [(float("inf"), (0,)), (200.0, (0, 1, 2)), (11.0, (1, 2)), (10.0, (2,))])
def test_dominated_and_outsized_choices_go(budget: float, kept: tuple[int, ...]) -> None:
    """Without a budget only seconds count; with one, 8 bytes of it go to node b."""
    choices = (Choice("quick", 1.0, nbytes=90.0), Choice("middling", 2.0, nbytes=3.0), Choice("slow", 3.0, nbytes=2.0),
               Choice("worse", 3.0, nbytes=95.0))
    nodes = (Node("a", choices), Node("b", (Choice("only", nbytes=8.0),)))
    assert presolve(Instance(nodes, (Segment("s", 1, (0, 1), ()),), budget)).kept == (kept, (0,))
