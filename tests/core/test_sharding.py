"""The price of a choice, on cases small enough for pencil and paper."""

import dataclasses
import math
import random

import pytest

from autopar.core.sharding import INTERFERENCE as SHOWN
from autopar.core.sharding import (
    Choice,
    Consumer,
    Flow,
    Instance,
    Moment,
    Node,
    Priced,
    Segment,
    Solution,
    ledger,
    price,
)
from tests.solver.instances import random_instance

FREE = Choice("free")
WORK = Choice("work", forward=2.0, backward=4.0)
STORED = Choice("stored", optimizer=0.5, nbytes=10.0)
TABLE = ((0.0, 3.0), (5.0, 0.0))
TWICE = ((0.0, 6.0), (10.0, 0.0))


def flow(*targets: int, source: int = 0, parameter: bool = False) -> Flow:
    """A value of node 0 to nodes 1, 2, …, each wanting its target whatever its choice."""
    consumers = tuple(Consumer(i + 1, (target,)) for i, target in enumerate(targets))
    return Flow("value", 0, (source,), consumers, TABLE, TWICE, parameter)


def instance(*nodes: Node, flows: tuple[Flow, ...] = (), count: int = 1) -> Instance:
    """One segment of all the nodes."""
    return Instance(nodes, (Segment("block", count, tuple(range(len(nodes))), flows),))


def nodes(*choices: Choice) -> tuple[Node, ...]:
    return tuple(Node(f"n{i}", (choice,)) for i, choice in enumerate(choices))


@pytest.mark.parametrize(("problem", "wanted"), [
    pytest.param(instance(*nodes(WORK, WORK)), Priced(12, 0, 0, 0, 0), id="compute adds up"),
    pytest.param(instance(*nodes(WORK), count=3), Priced(18, 0, 0, 0, 0), id="equal segments count"),
    pytest.param(instance(Node("n", (STORED,), count=4)), Priced(0, 0, 0, 2, 40), id="equal nodes count"),
    pytest.param(instance(*nodes(FREE, FREE), flows=(flow(0),)), Priced(0, 0, 0, 0, 0), id="same spec is free"),
    pytest.param(instance(*nodes(FREE, FREE), flows=(flow(1),)), Priced(0, 9, 0, 0, 0), id="one reshard"),
    pytest.param(instance(*nodes(FREE, FREE, FREE), flows=(flow(1, 1),)), Priced(0, 9, 0, 0, 0),
                 id="one reshard serves two consumers"),
    pytest.param(instance(*nodes(FREE, FREE, FREE), flows=(flow(0, 1),)), Priced(0, 9, 0, 0, 0),
                 id="only the consumer that differs pays"),
    pytest.param(instance(*nodes(FREE, FREE), flows=(flow(1), flow(0, source=1)), count=2), Priced(0, 48, 0, 0, 0),
                 id="each flow pays for itself"),
    pytest.param(instance(*nodes(WORK, FREE), flows=(flow(1, parameter=True),)), Priced(6, 0, 1 + 2 + SHOWN * 9, 0, 0),
                 id="parameter communication beyond compute is exposed, phase by phase"),
    pytest.param(instance(*nodes(WORK, WORK), flows=(flow(1, parameter=True),)), Priced(12, 0, SHOWN * 9, 0, 0),
                 id="parameter communication within compute is hidden"),
    pytest.param(instance(*nodes(FREE, FREE), flows=(flow(1), flow(1, parameter=True))), Priced(0, 9, SHOWN * 9, 0, 0),
                 id="parameter communication hides behind other communication"),
    pytest.param(instance(*nodes(FREE, FREE), flows=(flow(1, parameter=True), flow(1, parameter=True)), count=5),
                 Priced(0, 0, 5 * (18 + SHOWN * 18), 0, 0), id="parameter communication adds up before it hides"),
])
def test_price(problem: Instance, wanted: Priced) -> None:
    found = price(problem, (0,) * len(problem.nodes))
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(wanted), rel=1e-12)


def test_communication_hides_in_its_own_segment_only() -> None:
    gather = flow(1, parameter=True)
    busy, idle = Segment("busy", 1, (0,), ()), Segment("idle", 1, (1,), (gather,))
    assert price(Instance(nodes(WORK, FREE), (busy, idle)), (0, 0)) == Priced(6, 0, 9 + SHOWN * 9, 0, 0)


def test_choices_pick_costs_and_specs() -> None:
    producer = Node("producer", (WORK, STORED))
    consumer = Node("consumer", (FREE, WORK))
    value = Flow("value", 0, (0, 1), (Consumer(1, (1, 0)),), TABLE, TWICE)
    problem = instance(producer, consumer, flows=(value,))
    assert price(problem, (0, 0)) == Priced(6, 9, 0, 0, 0)
    assert price(problem, (0, 1)) == Priced(12, 0, 0, 0, 0)
    assert price(problem, (1, 0)) == Priced(0, 0, 0, 0.5, 10)
    assert price(problem, (1, 1)) == Priced(6, 15, 0, 0.5, 10)


@pytest.mark.parametrize("parameter", [False, True])
def test_no_way_between_specs_is_infinitely_dear(parameter: bool) -> None:
    blocked = ((0.0, math.inf), (0.0, 0.0))
    value = Flow("value", 0, (0,), (Consumer(1, (1,)),), blocked, TABLE, parameter)
    assert price(instance(*nodes(WORK, FREE), flows=(value,)), (0, 0)).seconds == math.inf


def test_seconds_are_the_sum() -> None:
    assert Priced(1, 2, 4, 8, 1e9).seconds == 15


@pytest.mark.parametrize(("seconds", "bound", "gap"), [(10, 10, 0), (10, 8, 0.2), (10, 10.5, 0)])
def test_gap(seconds: float, bound: float, gap: float) -> None:
    assert Solution("optimal", (), seconds, 0, bound, 0).gap == pytest.approx(gap)


def test_the_ledger_holds_what_prices_say() -> None:
    for seed in range(100):
        problem, generator = random_instance(seed), random.Random(seed)
        taken = tuple(generator.randrange(len(node.choices)) for node in problem.nodes)
        assert float(ledger(problem).of(taken).max()) == pytest.approx(price(problem, taken).nbytes, rel=1e-12)


@pytest.mark.parametrize(("moment", "nbytes"), [
    (Moment("m", (0, 0), (0, 0)), 25.0), (Moment("m", (2, 0), (0, 0)), 31.0), (Moment("m", (0, 0), (1, 1)), 65.0),
    (Moment("m", (0, 0), (0, 0), parameters=(0, 1)), 25.0 + 300.0),
    (Moment("m", (0, 0), (0, 0), ops=(0, 1)), 25.0 + 200.0), (Moment("m", (0, 0), (0, 0), (0,), (1,)), 25.0 + 300.0),
])
def test_bytes_of_a_moment(moment: Moment, nbytes: float) -> None:
    """Two of the first node and one of the second are held all the time: 2 · 10 + 5."""
    first = Choice("a", nbytes=10.0, saved=3.0, gradient=30.0, working=100.0)
    second = Choice("b", nbytes=5.0, saved=1.0, gradient=10.0, working=200.0)
    problem = Instance((Node("a", (first,), 2), Node("b", (second,))), (), moments=(moment,))
    assert price(problem, (0, 0)).nbytes == nbytes
