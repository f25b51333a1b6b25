"""Reshard paths: right on real arrays, forward and backward, and no dearer than exhaustive search finds."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.mesh import Mesh
from autopar.core.reshard import MOVES_DATA, Cargo, Path, Primitive, Step, cheapest_path, routes, spec_after
from autopar.core.spec import State, from_states, parse

MESHES = (Mesh((2,)), Mesh((2, 3)), Mesh((4, 2)))
RANK = 2
LOAD = Cargo(8.0)

# What a step does to the value and, in reverse, to its gradient; d and e are two dims.
CONVERSION: dict[tuple[str, str], tuple[Primitive, Primitive]] = {
    ("d", "e"): ("all_to_all", "all_to_all"),
    ("d", "R"): ("all_gather", "slice"),
    ("d", "P"): ("pad", "slice"),
    ("d", "G"): ("all_gather", "reduce_scatter"),
    ("R", "d"): ("slice", "all_gather"),
    ("R", "P"): ("mask", "identity"),
    ("R", "G"): ("identity", "all_reduce"),
    ("P", "d"): ("reduce_scatter", "all_gather"),
    ("P", "R"): ("all_reduce", "identity"),
    ("P", "G"): ("all_reduce", "all_reduce"),
    ("G", "d"): ("slice", "pad"),
    ("G", "R"): ("identity", "mask"),
    ("G", "P"): ("mask", "mask"),
}


@dataclass(frozen=True)
class Link:
    """A price: `latency` seconds and a rate for each primitive, dearer for all_reduce; `forbidden` has no price."""

    mesh: Mesh
    latency: float = 1.0
    gather: float = 1.0
    exchange: float = 1.0
    forbidden: Primitive | None = None

    def __call__(self, primitive: Primitive, axes: tuple[int, ...], nbytes: float) -> float:
        if primitive == self.forbidden:
            return math.inf
        peers = self.mesh.extent(axes)
        rate = {"all_reduce": 2 * self.gather, "all_to_all": self.exchange / peers}.get(primitive, self.gather)
        return self.latency + rate * nbytes * (peers - 1) / peers


@dataclass(frozen=True)
class Case:
    """A reshard on a mesh."""

    mesh: Mesh
    source: tuple[State, ...]
    target: tuple[State, ...]

    def path(self, cargo: Cargo, price: Link) -> Path:
        return cheapest_path(from_states(self.source, RANK), from_states(self.target, RANK), self.mesh, cargo, price)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    mesh = draw(st.sampled_from(MESHES))
    states = st.tuples(*[st.sampled_from([0, 1, "R", "P", "G"])] * len(mesh.shape))
    return Case(mesh, draw(states), draw(states))


# ---- the table

@pytest.mark.parametrize(("names", "primitives"), CONVERSION.items())
def test_primitives_of_a_step(names: tuple[str, str], primitives: tuple[Primitive, Primitive]) -> None:
    source, target = ({"d": 0, "e": 1}.get(name, name) for name in names)
    step = Step((0,), source, target)
    assert (step.forward, step.backward) == primitives


# ---- on real arrays

def place(whole: np.ndarray, states: tuple[State, ...], mesh: Mesh, noise: np.random.Generator) -> list[np.ndarray]:
    """What each device of `mesh`, in row-major order, holds of `whole` in `states`."""
    pieces = [whole]
    for size, state in zip(mesh.shape, states, strict=True):
        pieces = [part for piece in pieces for part in _parts(piece, size, state, noise)]
    return pieces


def _parts(piece: np.ndarray, size: int, state: State, noise: np.random.Generator) -> list[np.ndarray]:
    if isinstance(state, int):
        return np.split(piece, size, axis=state)
    if state != "P":
        return [piece] * size
    terms = [noise.integers(-9, 9, piece.shape) for _ in range(size - 1)]
    return [*terms, piece - sum(terms)]


def collect(pieces: list[np.ndarray], states: tuple[State, ...], mesh: Mesh) -> np.ndarray:
    """The whole that `pieces` in `states` stand for; replicas must agree."""
    for size, state in reversed(list(zip(mesh.shape, states, strict=True))):
        runs = [pieces[i:i + size] for i in range(0, len(pieces), size)]
        if state not in ("P", *range(RANK)):
            assert all(np.array_equal(run[0], other) for run in runs for other in run)
        join = {"P": sum, "R": lambda run: run[0], "G": lambda run: run[0]}
        pieces = [np.concatenate(run, axis=state) if isinstance(state, int) else join[state](run) for run in runs]
    return pieces[0]


def execute(primitive: Primitive, source: State, target: State, held: list[np.ndarray]) -> list[np.ndarray]:
    """One collective in one group."""
    peers = len(held)
    if primitive in ("identity", "mask"):
        return held if primitive == "identity" else [held[0], *(np.zeros_like(x) for x in held[1:])]
    if primitive in ("slice", "pad"):
        pieces = [np.split(x, peers, axis=target)[i] if primitive == "slice" else x for i, x in enumerate(held)]
        blank = np.zeros_like(held[0])
        padded = [np.concatenate([x if j == i else blank for j in range(peers)], axis=source)
                  for i, x in enumerate(held)] if primitive == "pad" else []
        return padded or pieces
    whole = np.concatenate(held, axis=source) if primitive in ("all_gather", "all_to_all") else sum(held)
    return np.split(whole, peers, axis=target) if isinstance(target, int) else [whole] * peers


def run(primitive: Primitive, step: Step, mesh: Mesh, pieces: list[np.ndarray]) -> list[np.ndarray]:
    """`primitive` over every group of the step's axes."""
    after = list(pieces)
    for group in mesh.groups(step.axes):
        for device, piece in zip(group, execute(primitive, step.source, step.target,
                                                [pieces[d] for d in group]), strict=True):
            after[device] = piece
    return after


def dual(states: tuple[State, ...]) -> tuple[State, ...]:
    """The states of the gradient, as those of a value."""
    return tuple({"P": "R", "G": "P"}.get(state, state) for state in states)


@given(cases(), st.integers(0, 2**32 - 1))
def test_paths_convert_values_and_gradients(case: Case, seed: int) -> None:
    noise = np.random.default_rng(seed)
    whole = noise.integers(-99, 99, (24, 24))
    path = case.path(Cargo(whole.nbytes), Link(case.mesh))

    pieces = place(whole, case.source, case.mesh, noise)
    for step in path.steps:
        pieces = run(step.forward, step, case.mesh, pieces)
    assert np.array_equal(collect(pieces, case.target, case.mesh), whole)

    pieces = place(whole, dual(case.target), case.mesh, noise)
    for step in reversed(path.steps):
        back = Step(step.axes, step.target, step.source)
        pieces = run(step.backward, back, case.mesh, pieces)
    assert np.array_equal(collect(pieces, dual(case.source), case.mesh), whole)


# ---- against exhaustive search

@dataclass(frozen=True)
class Layout:
    """The axes over each dim as a stack, innermost last, and the state of each axis that is on none."""

    stacks: tuple[tuple[int, ...], ...]
    loose: tuple[tuple[int, str], ...]

    def state(self, axis: int) -> State:
        return dict(self.loose).get(axis, next((d for d, stack in enumerate(self.stacks) if axis in stack), "R"))


def layout(states: tuple[State, ...]) -> Layout:
    stacks = tuple(tuple(a for a, state in enumerate(states) if state == dim) for dim in range(RANK))
    return Layout(stacks, tuple((a, state) for a, state in enumerate(states) if not isinstance(state, int)))


def moved(before: Layout, axes: tuple[int, ...], target: State) -> Layout | None:
    """`axes` popped off their stack and pushed on another; None when they are not on top or would lie in disorder."""
    stacks, source = [list(stack) for stack in before.stacks], before.state(axes[0])
    if isinstance(source, int):
        if tuple(stacks[source][-len(axes):]) != axes:
            return None
        del stacks[source][-len(axes):]
    if isinstance(target, int):
        stacks[target] += axes
        if stacks[target] != sorted(stacks[target]):
            return None
    kept = [(a, state) for a, state in before.loose if a not in axes]
    loose = kept if isinstance(target, int) else [*kept, *((a, target) for a in axes)]
    return Layout(tuple(map(tuple, stacks)), tuple(sorted(loose)))


def seconds_of(before: Layout, after: Layout, axes: tuple[int, ...], cargo: Cargo, price: Link) -> float:
    source, target = before.state(axes[0]), after.state(axes[0])
    names = ("d" if isinstance(source, int) else source,
             "e" if isinstance(source, int) and isinstance(target, int) else "d" if isinstance(target, int) else target)
    parts = min(price.mesh.extent(tuple(itertools.chain(*side.stacks))) for side in (before, after))
    collectives = [p for p in CONVERSION[names] if p not in ("identity", "slice", "mask", "pad")]
    phases = collectives if cargo.differentiable else [p for p in CONVERSION[names][:1] if p in collectives]
    return sum(price(primitive, axes, cargo.nbytes / parts) for primitive in phases)


def exhaustive(case: Case, cargo: Cargo, price: Link) -> float:
    """The fewest seconds over all step sequences."""
    groups = [group for size in case.mesh.axes for group in itertools.combinations(case.mesh.axes, size + 1)]
    best, fresh = {layout(case.source): 0.0}, [layout(case.source)]
    while fresh:
        before = fresh.pop()
        for axes in groups:
            source = before.state(axes[0])
            targets = {*range(RANK), "R", "P", "G"} - {source}
            for target in targets:
                together = all(before.state(a) == source for a in axes)
                after = moved(before, axes, target) if together else None
                if after is None:
                    continue
                seconds = best[before] + seconds_of(before, after, axes, cargo, price)
                if seconds < best.get(after, math.inf):
                    best[after] = seconds
                    fresh.append(after)
    return best.get(layout(case.target), math.inf)


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans(), st.sampled_from([0.0, 0.1, 10.0]), st.sampled_from([0.1, 1.0, 5.0]))
def test_no_sequence_is_cheaper(case: Case, differentiable: bool, latency: float, exchange: float) -> None:
    cargo, price = Cargo(8.0, differentiable), Link(case.mesh, latency, 1.0, exchange)
    assert case.path(cargo, price).seconds == pytest.approx(exhaustive(case, cargo, price))


@pytest.mark.parametrize("mesh", MESHES[:2], ids=str)
def test_no_sequence_is_cheaper_on_small_meshes(mesh: Mesh) -> None:
    price = Link(mesh, 0.1)
    states = list(itertools.product([0, 1, "R", "P", "G"], repeat=len(mesh.shape)))
    for source, target in itertools.product(states, repeat=2):
        case = Case(mesh, source, target)
        assert case.path(LOAD, price).seconds == pytest.approx(exhaustive(case, LOAD, price)), case


@pytest.mark.parametrize(("source", "target"), [
    ((0, 0, 1), (1, 0, 0)), (("P", "P", 0), (0, 1, "G")), (("G", 1, "R"), (1, "R", 1)), ((0, 1, 0), ("P", 0, 1)),
])
def test_no_sequence_is_cheaper_on_three_axes(source: tuple[State, ...], target: tuple[State, ...]) -> None:
    case = Case(Mesh((2, 3, 2)), source, target)
    price = Link(case.mesh, 0.1)
    assert case.path(LOAD, price).seconds == pytest.approx(exhaustive(case, LOAD, price))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([*MESHES, Mesh((2, 2, 2))]), st.tuples(*[st.sampled_from([2, 4, 6, 24])] * RANK), st.booleans(),
       st.sampled_from([0.0, 0.1, 10.0]), st.integers(0, 2**32 - 1))
def test_tables_agree_with_walked_paths(mesh: Mesh, sizes: tuple[int, ...], differentiable: bool, latency: float,
                                        seed: int) -> None:
    cargo, price, rng = Cargo(8.0, differentiable, sizes), Link(mesh, latency), random.Random(seed)
    found = routes(RANK, mesh, cargo, price)
    sources, targets = (rng.choices(found.graph.states, k=6) for _ in range(2))
    forward, backward = found.seconds(sources, targets)
    for (i, source), (j, target) in itertools.product(enumerate(sources), enumerate(targets)):
        walked = cheapest_path(from_states(source, RANK), from_states(target, RANK), mesh, cargo, price)
        assert (forward[i, j], backward[i, j]) == pytest.approx((walked.forward, walked.backward), rel=1e-12)
        assert walked.forward == pytest.approx(sum(seconds for seconds, _ in priced(walked, source, cargo, price)))
        assert walked.backward == pytest.approx(sum(seconds for _, seconds in priced(walked, source, cargo, price)))


def priced(found: Path, source: tuple[State, ...], cargo: Cargo, price: Link) -> Iterator[tuple[float, float]]:
    """Seconds forward and backward of each step of a path, from the states it goes through."""
    states = list(source)
    for step in found.steps:
        before = [a for a, state in enumerate(states) if isinstance(state, int)]
        for axis in step.axes:
            states[axis] = step.target
        after = [a for a, state in enumerate(states) if isinstance(state, int)]
        nbytes = cargo.nbytes / min(price.mesh.extent(tuple(before)), price.mesh.extent(tuple(after)))
        forward, backward = (price(p, step.axes, nbytes) if p in MOVES_DATA else 0.0
                             for p in (step.forward, step.backward))
        yield forward, backward if cargo.differentiable else 0.0


# ---- by hand

def path(source: str, target: str, mesh: Mesh, cargo: Cargo = LOAD, **link: object) -> Path:
    return cheapest_path(parse(source), parse(target), mesh, cargo, Link(mesh, **link))


@pytest.mark.parametrize(("source", "target", "steps"), [
    ("S0R", "S0R", []),
    ("S0R", "RR", [Step((0,), 0, "R")]),
    ("RR(P0)", "S0R", [Step((0,), "P", 0)]),
    ("S0R", "RS0", [Step((0,), 0, 1)]),
    ("S01R", "RR", [Step((0, 1), 0, "R")]),
    ("S01R", "S0R", [Step((1,), 0, "R")]),
    # The outer axis cannot leave alone, nor arrive over the inner one: a way through the other dim is cheapest.
    ("S01R", "S1R", [Step((0, 1), 0, 1), Step((1,), 1, 0), Step((0,), 1, "R")]),
    ("S1R", "S01R", [Step((0,), "R", 1), Step((1,), 0, 1), Step((0, 1), 1, 0)]),
])
def test_steps(source: str, target: str, steps: list[Step]) -> None:
    assert list(path(source, target, Mesh((2, 2)), Cargo(8.0, differentiable=False)).steps) == steps


@pytest.mark.parametrize(("source", "target", "forward", "backward"), [
    ("RR", "RR", 0.0, 0.0),
    ("S0R", "RR", 1 + 8 / 2, 0.0),
    ("RR", "S0R", 0.0, 1 + 8 / 2),
    ("RR(P0)", "RR", 1 + 2 * 8 / 2, 0.0),
    ("RR", "RR(G0)", 0.0, 1 + 2 * 8 / 2),
    ("S0R", "RR(G0)", 1 + 8 / 2, 1 + 8 / 2),
    ("S0R", "RS0", 1 + 8 / 2 / 4, 1 + 8 / 2 / 4),
    ("S0S1", "RS1", 1 + 8 / 3 / 2, 0.0),
])
def test_seconds(source: str, target: str, forward: float, backward: float) -> None:
    found = path(source, target, Mesh((2, 3)))
    assert (found.forward, found.backward) == pytest.approx((forward, backward))


def test_cargo_without_gradient_pays_no_backward() -> None:
    assert path("RR", "S0R", Mesh((2,)), Cargo(8.0, differentiable=False)).seconds == 0.0
    assert path("S0R", "RR(G0)", Mesh((2,)), Cargo(8.0, differentiable=False)).backward == 0.0


def test_way_round_a_forbidden_primitive() -> None:
    found = path("S0R", "RS0", Mesh((2,)), forbidden="all_to_all")
    assert [step.forward for step in found.steps] == ["all_gather", "slice"]


@pytest.mark.parametrize(("source", "target", "forbidden", "instead"), [
    ("S0R", "RR", "all_gather", ["pad", "all_reduce"]),
    ("RR(P0)", "RR", "all_reduce", ["reduce_scatter", "all_gather"]),
])
def test_other_collectives_do_as_well(source: str, target: str, forbidden: Primitive, instead: list[str]) -> None:
    assert [step.forward for step in path(source, target, Mesh((2,)), forbidden=forbidden).steps] == instead


def test_sizes_that_do_not_divide_are_not_cut() -> None:
    cargo = Cargo(8.0, differentiable=False, sizes=(4, 3))
    found = path("S01R", "S1R", Mesh((2, 2)), cargo)
    assert all(1 not in (step.source, step.target) for step in found.steps)


@given(cases())
def test_spec_after_the_steps_is_the_target(case: Case) -> None:
    spec = from_states(case.source, RANK)
    for step in case.path(LOAD, Link(case.mesh)).steps:
        spec = spec_after(step, spec, len(case.mesh.shape))
    assert spec == from_states(case.target, RANK)
