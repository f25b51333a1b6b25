"""What parameters cost on their way into ops, against each storage and target priced alone."""

from __future__ import annotations

import itertools

import pytest

from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.core.reshard import Cargo, cheapest_path
from autopar.core.spec import Spec, State, from_states, parse
from autopar.passes.gathering import Together, parameter_seconds, replicated_axes, with_summed
from autopar.passes.strategies import Storage

CLUSTER = Cluster.preset("2x4xA100-80GB")
SIZES = (24, 8)


def alone(storage: Storage, target: Spec, cargo: Cargo, mesh: Mesh, together: Together) -> tuple[float, float]:
    """Seconds forward and backward from how a parameter rests to `target`."""
    price, trained = CLUSTER.pricer(mesh), cargo.differentiable
    scale, share = together.reduce_scale, together.latency_share
    start = storage.spec(len(target.dims), trained)
    nbytes = cargo.nbytes / mesh.extent(start.axes)

    def bandwidth(primitive: str, axes: tuple[int, ...], nbytes: float) -> float:
        if not axes:
            return 0.0
        every = price(primitive, tuple(mesh.axes), 0.0)  # type: ignore[arg-type]
        return price(primitive, axes, nbytes) - price(primitive, axes, 0.0) + every * share  # type: ignore[arg-type]

    forward = bandwidth("all_gather", storage.gathered, nbytes)
    again = 0.0 if storage.kept else forward
    backward = again + bandwidth("reduce_scatter", storage.gathered, scale * nbytes) if trained else 0.0
    summed = replicated_axes(start, target)
    backward += bandwidth("all_reduce", summed, scale * nbytes / mesh.extent(storage.gathered))
    path = cheapest_path(with_summed(start, summed), target, mesh, cargo, price)
    return forward + path.forward, backward + path.backward


@pytest.mark.parametrize("together", [Together(1.0, 1.0), Together(2.0, 0.25)])
@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("shape", [(8,), (2, 4)], ids=str)
def test_tables_are_of_each_storage_and_target_alone(shape: tuple[int, ...], differentiable: bool,
                                                     together: Together) -> None:
    mesh, cargo = Mesh(shape), Cargo(4e6, differentiable, SIZES)
    resting: list[int | str] = ["R", "Z", "K", 0, 1]
    stored = [Storage(states) for states in itertools.product(resting, repeat=len(shape))]
    wanted: list[State] = ["R", 0, 1, *(["G"] if differentiable else [])]  # type: ignore[list-item]
    targets = list(itertools.product(wanted, repeat=len(shape)))
    travel = parameter_seconds(stored, targets, cargo, mesh, CLUSTER.pricer(mesh), together)
    (forward, backward), inline = travel.hidden, travel.inline
    assert forward.shape == backward.shape == (len(stored), len(targets))
    for (i, storage), (j, states) in itertools.product(enumerate(stored), enumerate(targets)):
        expected = alone(storage, from_states(states, len(SIZES)), cargo, mesh, together)
        found = forward[i, j] + inline[0][i, j], backward[i, j] + inline[1][i, j]
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-18), (storage, states)


@pytest.mark.parametrize(("start", "target", "axes", "summed"), [
    ("RR", "RR(G01)", (0, 1), "RR(G01)"),
    ("RR(G0)", "RR(G01)", (1,), "RR(G01)"),
    ("S0R", "S0R(G1)", (1,), "S0R(G1)"),
    ("S0R", "RR(G0)", (), "S0R"),
    ("RR", "RS0", (), "RR"),
])
def test_sums_of_gradients_of_replicated_parameters(start: str, target: str, axes: tuple[int, ...],
                                                    summed: str) -> None:
    assert replicated_axes(parse(start), parse(target)) == axes
    assert str(with_summed(parse(start), axes)) == summed
