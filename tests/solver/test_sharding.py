"""Sharding against its brute-force twin, and what users are told when nothing fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.core.errors import AutoparError, Infeasible
from autopar.core.sharding import INTERFERENCE, Choice, Consumer, Flow, Instance, Node, Segment, price
from autopar.solver.optimise import improve, least_bytes, optimise
from autopar.solver.sharding import decode, formulate
from tests.solver.instances import EXACT, INF, Table, layered, least_held, least_seconds, random_instance, tangled


def check_against_brute_force(instance: Instance, solver: str) -> str:
    """Assert that the solver finds the optimum; says what kind of instance it was."""
    best = least_seconds(instance)
    if best == INF:
        with pytest.raises(Infeasible):
            optimise(instance, solver)
        return "infeasible"
    found = optimise(instance, solver)
    priced = price(instance, found.choices)
    assert found.seconds == pytest.approx(best, rel=EXACT, abs=1e-15)
    assert (priced.seconds, priced.nbytes) == pytest.approx((found.seconds, found.nbytes), rel=EXACT)
    assert priced.nbytes <= instance.budget
    assert (found.status, found.gap) == ("optimal", 0.0)
    return "free" if least_seconds(replace(instance, budget=INF)) >= best * (1 - EXACT) else "bound by the budget"


@pytest.mark.parametrize(("solver", "seeds"), [("highs", range(250)), ("cbc", range(200))])
def test_optimum_is_that_of_brute_force(solver: str, seeds: range) -> None:
    kinds = [check_against_brute_force(random_instance(seed), solver) for seed in seeds]
    for kind in ("infeasible", "free", "bound by the budget"):
        assert kinds.count(kind) > len(seeds) / 10, f"too few instances are {kind}"


def test_the_model_without_presolve_is_exact_too() -> None:
    for instance in map(random_instance, range(100)):
        outcome = formulate(instance).solve("highs")
        if outcome.status == "optimal" and (found := decode(instance, outcome)).nbytes <= instance.budget:
            assert found.seconds == pytest.approx(least_seconds(instance), rel=EXACT, abs=1e-15)


def test_least_bytes_is_that_of_brute_force() -> None:
    for instance in map(random_instance, range(100)):
        if (least := least_held(instance)) < INF:
            assert least_bytes(instance, "highs") == pytest.approx(least, rel=EXACT)


def chain(*choices: tuple[Choice, ...], way: Table = ((0.0, 1.0), (1.0, 0.0)), budget: float = INF) -> Instance:
    """Nodes a, b, … of two choices each: choice c emits and wants spec c, changed at `way` seconds forward."""
    nodes = tuple(Node("abcdef"[n], of) for n, of in enumerate(choices))
    none = tuple((0.0,) * len(row) for row in way)
    flows = tuple(Flow(f"{nodes[n].name}_out", n, (0, 1), (Consumer(n + 1, (0, 1)),), way, none)
                  for n in range(len(nodes) - 1))
    return Instance(nodes, (Segment("all", 1, tuple(range(len(nodes))), flows),), budget)


CHEAP_FIRST = (Choice("split", 1.0, nbytes=2.0 ** 30), Choice("whole", 5.0, nbytes=2.0 ** 31))
CHEAP_SECOND = (Choice("split", 5.0, nbytes=2.0 ** 31), Choice("whole", 1.0, nbytes=2.0 ** 30))


def test_a_change_of_spec_is_taken_where_it_pays() -> None:
    assert optimise(chain(CHEAP_FIRST, CHEAP_SECOND)).seconds == 3.0
    assert optimise(chain(CHEAP_FIRST, CHEAP_SECOND), "highs").choices == (0, 1)
    assert optimise(chain(CHEAP_FIRST, CHEAP_SECOND, way=((0.0, 9.0), (9.0, 0.0)))).seconds == 6.0


def test_consumers_of_one_spec_share_the_change() -> None:
    source, taker = Node("x", (Choice("split"),)), (Choice("whole"),)
    flow = Flow("x", 0, (0,), (Consumer(1, (1,)), Consumer(2, (1,)), Consumer(3, (1,))), ((0.0, 2.0),), ((0.0, 0.5),))
    instance = Instance((source, *(Node(name, taker) for name in "qkv")), (Segment("s", 3, (0, 1, 2, 3), (flow,)),))
    assert optimise(instance).seconds == 7.5


def test_parameter_communication_hides_behind_compute() -> None:
    weight, op = Node("w", (Choice("sharded"),)), Node("op", (Choice("only", 2.0, 3.0),))
    flow = Flow("w", 0, (0,), (Consumer(1, (0,)),), ((1.5,),), ((4.0,),), parameter=True)
    assert optimise(Instance((weight, op), (Segment("s", 2, (1,), (flow,)),))).seconds == pytest.approx(
        2 * (2.0 + 4.0 + INTERFERENCE * (1.5 + 4.0)))


def test_no_way_between_two_nodes_is_told_by_name() -> None:
    shut = chain(CHEAP_FIRST, CHEAP_SECOND, CHEAP_FIRST, way=((INF, INF), (INF, INF)), budget=2.0 ** 40)
    with pytest.raises(Infeasible, match=r"no choice fits the connections.*at least 2.*a_out from a \(\w+\) to b \("):
        optimise(shut)


def test_a_budget_too_small_is_told_with_the_least_that_does() -> None:
    with pytest.raises(Infeasible, match=r"needs 2\.000 GiB a device \(2147483648 bytes\), budget 1\.500 GiB"):
        optimise(chain(CHEAP_FIRST, CHEAP_SECOND, budget=1.5 * 2 ** 30))
    unequal = chain(CHEAP_FIRST, CHEAP_SECOND, way=((0.0, INF), (INF, 0.0)), budget=2.5 * 2 ** 30)
    with pytest.raises(Infeasible, match=r"needs 3\.000 GiB"):
        optimise(unequal, "highs")


@pytest.mark.parametrize("solver", ["cbc", "highs"])
def test_a_byte_over_the_budget_is_over_it(solver: str) -> None:
    quick, slow = Choice("quick", 1.0, nbytes=1e11 + 1), Choice("slow", 2.0, nbytes=1e11)
    instance = Instance((Node("a", (quick, slow)), Node("b", (Choice("only", nbytes=5.0),))),
                        (Segment("s", 1, (0, 1), ()),), 1e11 + 5)
    assert optimise(instance, solver).choices == (1, 0)
    assert optimise(replace(instance, budget=1e11 + 6), solver).choices == (0, 0)


def test_a_node_without_choices_is_refused() -> None:
    with pytest.raises(Infeasible, match="empty has no choice"):
        optimise(Instance((Node("empty", ()),), ()))


def test_no_time_to_solve_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.solver.optimise._known", lambda *_: None)
    monkeypatch.setattr("autopar.solver.optimise._solved", lambda *_: None)
    with pytest.raises(AutoparError, match=r"found no solution of sharding: \d+ variables, \d+ rows within 0\.1 s"):
        optimise(chain(CHEAP_FIRST, CHEAP_SECOND), limit_s=0.1)


@pytest.mark.parametrize("solver", ["cbc", "highs"])
def test_a_time_limit_leaves_a_gap(solver: str) -> None:
    instance = tangled(40, 12)
    found = optimise(instance, solver, limit_s=2.0)
    assert found.status == "feasible"
    assert found.seconds == pytest.approx(price(instance, found.choices).seconds)
    assert 0.0 < found.bound < found.seconds


def test_a_large_instance_is_solved_alike_by_both() -> None:
    instance = layered(60, 40)
    first, second = optimise(instance, "cbc"), optimise(instance, "highs")
    assert first.seconds == pytest.approx(second.seconds, rel=EXACT)
    assert first == replace(optimise(instance, "cbc"), solve_seconds=first.solve_seconds)


@pytest.mark.parametrize("solver", ["cbc", "highs"])
def test_nothing_better_is_proven(solver: str) -> None:
    for instance in map(random_instance, range(40)):
        if (best := least_seconds(instance)) < INF:
            found = improve(instance, best * 1.01 + 1e-12, solver)
            assert found is not None and found.seconds == pytest.approx(best, rel=EXACT, abs=1e-15)
            beaten = improve(instance, best * 0.5, solver)
            assert beaten is None or beaten.seconds == pytest.approx(best, rel=EXACT, abs=1e-15)


def test_a_value_may_have_more_consumers_than_arrays_have_dims() -> None:
    taker = (Choice("split", 1.0), Choice("whole", 0.25))
    flow = Flow("x", 0, (0, 1), tuple(Consumer(n, (0, 1)) for n in range(1, 101)), ((0.0, 5.0), (5.0, 0.0)),
                ((0.0, 0.0), (0.0, 0.0)))
    nodes = (Node("x", (Choice("split"), Choice("whole", 7.0))), *(Node(f"n{n}", taker) for n in range(1, 101)))
    found = optimise(Instance(nodes, (Segment("s", 1, tuple(range(101)), (flow,)),)))
    assert (found.seconds, found.status) == (30.0, "optimal")
