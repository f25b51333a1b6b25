"""The numbers of a sharding problem, by hand on a two-layer perceptron and against lowered programs."""

from __future__ import annotations

import itertools
import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh
from autopar.core.sharding import Choice, Flow, price
from autopar.core.spec import Spec
from autopar.passes.costs import OPTIMIZERS
from autopar.passes.decision import context as context_of
from autopar.passes.modes import MODES
from autopar.passes.problem import Problem, Setting, build, check_batch
from autopar.passes.strategies import Storage
from autopar.planner import price_lowered
from tests.programs import annotated, model_context

CLUSTER = Cluster.preset("2xA100-80GB")
DEVICE = CLUSTER.devices[0]
FLOAT = 4


def perceptron(t: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(8, 4) inputs, 16 hidden, 2 out, their sum."""
    return F.linear(F.relu(F.linear(t, first)), second).sum((0, 1))


def setting(mesh: tuple[int, ...] = (2,), mode: str = "auto", cluster: Cluster = CLUSTER, **options: Any) -> Setting:
    return Setting(Mesh(mesh), cluster, MODES[mode], OPTIMIZERS["adamw"], **options)


@cache
def problem(mode: str = "auto") -> Problem:
    weights = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(2, 16))
    return build(annotated(perceptron, torch.randn(8, 4), *weights), setting(mode=mode))


def choices(found: Problem, name: str) -> dict[str, Choice]:
    return {c.name: c for node in found.instance.nodes if node.name == name for c in node.choices}


def flow(found: Problem, name: str) -> Flow:
    return next(f for segment in found.instance.segments for f in segment.flows if f.name == name)


def seconds(primitive: Any, nbytes: float) -> float:
    return setting().price(primitive, (0,), nbytes)


def together(primitive: Any, nbytes: float) -> float:
    """Of two weights that travel together: half the latency."""
    return seconds(primitive, nbytes) - seconds(primitive, 0.0) / 2


def test_nodes() -> None:
    found = problem().instance
    assert [node.name for node in found.nodes] == ["output", "linear", "relu", "linear_1", "sum", "held1", "held2"]
    assert {node.count for node in found.nodes} == {1}
    assert {name: set(choices(problem(), name)) for name in ("linear", "relu", "sum", "held1", "held2")} == {
        "linear": {"e0", "k", "n", "R"}, "relu": {"o0", "o1", "R"}, "sum": {"o0", "o1", "R"},
        "held1": {"R", "Z", "K", "0", "1"}, "held2": {"R", "Z", "K", "0", "1"}}


@pytest.mark.parametrize(("choice", "flop", "read_and_written", "saved"), [
    ("R", 2 * 8 * 4 * 16, 8 * 4 + 16 * 4 + 8 * 16, 8 * 16),
    ("e0", 2 * 4 * 4 * 16, 4 * 4 + 16 * 4 + 4 * 16, 4 * 16),
    ("n", 2 * 8 * 4 * 8, 8 * 4 + 8 * 4 + 8 * 8, 8 * 8),
    ("k", 2 * 8 * 2 * 16, 8 * 2 + 16 * 2 + 8 * 16, 8 * 16),
])
def test_an_op_costs_its_local_work_and_keeps_its_result(choice: str, flop: float, read_and_written: int,
                                                         saved: int) -> None:
    found = choices(problem(), "linear")[choice]
    rate = DEVICE.peak.fp32 * DEVICE.efficiency
    forward = max(flop / rate, FLOAT * read_and_written / DEVICE.memory_bytes_per_s) + DEVICE.launch_s
    assert found.forward == pytest.approx(forward, rel=1e-12)
    backward = max(2 * flop / rate, 2 * FLOAT * read_and_written / DEVICE.memory_bytes_per_s) + DEVICE.launch_s
    assert found.backward == pytest.approx(backward, rel=1e-12)
    assert (found.nbytes, found.optimizer, found.gradient) == (0.0, 0.0, 0.0)
    assert (found.saved, found.working) == (FLOAT * saved, FLOAT * read_and_written)


@pytest.mark.parametrize(("storage", "parts"), [("R", 1), ("Z", 2), ("0", 2), ("1", 2)])
def test_a_parameter_holds_itself_its_gradient_and_the_optimizer_s_state(storage: str, parts: int) -> None:
    found = choices(problem(), "held1")[storage]
    elements = 16 * 4 / parts
    assert (found.nbytes, found.gradient) == (elements * (4 + 8), elements * 4)
    assert found.optimizer == pytest.approx(elements * 28 / DEVICE.memory_bytes_per_s, rel=1e-12)
    assert (found.forward, found.backward) == (0.0, 0.0)


@pytest.mark.parametrize(("storage", "choice", "forward", "backward"), [
    ("R", "R", 0, 0),
    ("R", "e0", 0, together("all_reduce", 256)),
    ("Z", "e0", together("all_gather", 256), together("all_gather", 256) + together("reduce_scatter", 256)),
    ("0", "n", 0, 0),
    ("1", "k", 0, 0),
    ("R", "n", 0, seconds("all_gather", 256)),
    ("0", "R", seconds("all_gather", 256), 0),
    ("0", "e0", seconds("all_gather", 256), seconds("reduce_scatter", 256)),
    ("0", "k", seconds("all_to_all", 128), seconds("all_to_all", 128)),
])
def test_a_parameter_on_its_way_into_a_linear(storage: str, choice: str, forward: float, backward: float) -> None:
    """Its weight, 16 x 4 floats."""
    found, weight = problem(), flow(problem(), "p_held1")
    names = [c.name for c in found.instance.nodes[weight.producer].choices]
    (consumer,) = weight.consumers
    target = consumer.targets[[c.name for c in found.instance.nodes[consumer.node].choices].index(choice)]
    source = weight.sources[names.index(storage)]
    assert weight.parameter
    sides = [f for segment in found.instance.segments for f in segment.flows if f.name == "p_held1"]
    assert [side.parameter for side in sides] == [True, False]
    assert sum(side.forward[source][target] for side in sides) == pytest.approx(forward, rel=1e-9, abs=1e-15)
    assert sum(side.backward[source][target] for side in sides) == pytest.approx(backward, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("source", "target", "forward", "backward"), [
    ("RR", "RR", 0, 0),
    ("RR(P0)", "RR", seconds("all_reduce", 512), 0),
    ("RR(P0)", "S0R", seconds("reduce_scatter", 512), seconds("all_gather", 512)),
    ("S0R", "RS0", seconds("all_to_all", 256), seconds("all_to_all", 256)),
    ("S0R", "RR", seconds("all_gather", 512), 0),
    ("RR", "RS0", 0, seconds("all_gather", 512)),
    ("RS0", "RS0", 0, 0),
])
def test_a_value_on_its_way_to_its_consumer(source: str, target: str, forward: float, backward: float) -> None:
    """The hidden layer, 8 x 16 floats."""
    found = problem()
    hidden = flow(found, "linear")
    ends = next(e for segment in found.ends for e in segment if e.value.name == "linear")
    s, t = [str(x) for x in ends.sources].index(source), [str(x) for x in ends.targets].index(target)
    assert not hidden.parameter
    assert hidden.forward[s][t] == pytest.approx(forward, rel=1e-9)
    assert hidden.backward[s][t] == pytest.approx(backward, rel=1e-9)


def test_the_output_is_wanted_whole() -> None:
    found, total = problem(), flow(problem(), "sum_1")
    (consumer,) = total.consumers
    assert found.instance.nodes[consumer.node].name == "output"
    ends = next(e for segment in found.ends for e in segment if e.value.name == "sum_1")
    assert [str(spec) for spec in ends.sources] == ["(P0)", ""]
    assert ends.targets == (Spec(()),)
    assert total.forward[0][0] == pytest.approx(seconds("all_reduce", FLOAT))


@pytest.mark.parametrize(("mode", "op", "parameter"), [
    ("ddp", {"e0"}, {"R"}), ("zero3", {"e0"}, {"Z"}), ("1d", {"n", "R"}, {"R", "0"}),
])
def test_a_mode_leaves_out_choices(mode: str, op: set[str], parameter: set[str]) -> None:
    assert set(choices(problem(mode), "linear")) == op
    assert set(choices(problem(mode), "held1")) == parameter


def test_pinned_parameters_have_one_choice() -> None:
    context = problem().context
    node = context.segmented.factored.program.node("p_held1")
    found = build(context, setting(pinned={"p_held1": Storage(("Z",))}))
    assert [str(s) for s in found.stored[found.parameter_nodes[node]]] == ["Z"]


def test_equal_layers_are_decided_once_and_shared_parameters_alone() -> None:
    found = build(model_context("gpt2"), setting())
    counts = {node.name: node.count for node in found.instance.nodes}
    assert counts["transformer_h_0_attn_c_attn"] == counts["transformer.h.0.attn.c_attn.weight"] == 2
    assert counts["transformer_ln_f"] == counts["transformer.wte.weight"] == 1
    assert not any("h_1" in name for name in counts)
    tied = [f for segment in found.instance.segments for f in segment.flows
            if found.instance.nodes[f.producer].name == "transformer.wte.weight"]
    assert [f.parameter for f in tied] == [True, False] * 2


def test_a_problem_does_not_depend_on_meshes_built_before() -> None:
    context, where = model_context("gpt2"), setting((2, 2), cluster=Cluster.preset("4xA100-80GB"))
    found = build(context, where).instance
    build(context, setting((4,), "zero3", Cluster.preset("4xA100-80GB")))
    fresh = context_of(context.segmented)
    assert build(context, where).instance == build(fresh, where).instance == found


@pytest.mark.parametrize(("mode", "mesh", "message"), [
    ("ddp", (3,), r"the batch of 8 does not divide over 3 devices, as mode ddp needs; use a batch of 9"),
    ("zero3", (5,), r"use a batch of 10"),
    ("auto", (3,), None), ("1d", (3,), None), ("ddp", (2,), None),
])
def test_a_batch_that_does_not_divide_is_refused(mode: str, mesh: tuple[int, ...], message: str | None) -> None:
    cluster = Cluster.preset(f"{mesh[0]}xA100-80GB")
    if message is None:
        check_batch(problem().context, setting(mesh, mode, cluster))
    else:
        with pytest.raises(AutoparError, match=message):
            check_batch(problem().context, setting(mesh, mode, cluster))


@pytest.mark.parametrize("mesh", [(2,), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize(("name", "precision", "count"), [
    ("mlp", "fp32", 20), ("mlp", "bf16-mixed", 20), ("gpt2", "bf16-mixed", 10), ("gpt2", "fp32", 5),
    ("resnet", "bf16-mixed", 5),
])
def test_any_decision_is_priced_like_its_lowered_program(name: str, precision: Any, count: int,
                                                         mesh: tuple[int, ...]) -> None:
    where = setting(mesh, cluster=Cluster.preset(f"cpu:{Mesh(mesh).size}"))
    found, generator = build(model_context(name, precision), where), random.Random(0)
    for _ in range(count):
        taken = tuple(generator.randrange(len(node.choices)) for node in found.instance.nodes)
        claimed = price(found.instance, taken)
        lowered, memory = price_lowered(found.decide(taken), where)
        for part in ("compute", "inline", "exposed", "optimizer", "nbytes"):
            assert getattr(lowered, part) == pytest.approx(getattr(claimed, part), rel=1e-6, abs=1e-12), part
        assert memory.total == pytest.approx(claimed.nbytes, rel=1e-6)


def twice(t: Tensor, weight: Tensor) -> Tensor:
    """A weight read by two ops of a segment, for which it is gathered once."""
    return F.linear(F.linear(t, weight), weight.t()).sum((0, 1))


@pytest.mark.parametrize("mesh", [(2,), (2, 2)])
def test_who_reads_a_parameter_shares_its_gathers(mesh: tuple[int, ...]) -> None:
    where = setting(mesh, cluster=Cluster.preset(f"cpu:{Mesh(mesh).size}"))
    found = build(annotated(twice, torch.randn(8, 16), nn.Parameter(torch.randn(16, 16))), where)
    for taken in random.Random(0).sample(every_choice(found), 40):
        claimed, (lowered, _) = price(found.instance, taken), price_lowered(found.decide(taken), where)
        assert lowered.exposed == pytest.approx(claimed.exposed, rel=1e-6, abs=1e-12), taken
        assert lowered.inline == pytest.approx(claimed.inline, rel=1e-6, abs=1e-12), taken


def every_choice(found: Problem) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(node.choices)) for node in found.instance.nodes)))
