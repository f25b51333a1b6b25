"""Plans: solved and verified, saved and read, refused when they don't fit."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError, Infeasible
from autopar.core.mesh import Mesh
from autopar.passes.capture import capture, keep_loss
from autopar.plan import FORMAT, Plan
from autopar.planner import Request, decision_of, prepare, shapes_for, solve, verify
from tests import builders
from tests.programs import annotated, model_context, raw

MESHES = [(2,), (4,), (2, 2), (4, 2)]
MODES = ["auto", "ddp", "zero2", "zero3", "1d", "sequence"]
GRIDS = {"zero+1d": [(2, 2), (4, 2)], "2d": [(2, 2)]}
"""Modes that want two axes, and the meshes they take."""
AGREEMENT = 1e-6


def cluster(mesh: tuple[int, ...]) -> Cluster:
    return builders.quick(Mesh(mesh).size)


@cache
def planned(name: str, mesh: tuple[int, ...], mode: str) -> Plan:
    """HiGHS takes the ResNet on two axes, for which CBC needs minutes."""
    solver = "highs" if name == "resnet" and len(mesh) > 1 else "cbc"
    return solve(model_context(name, "bf16-mixed"), cluster(mesh), Request(name, mode, mesh, solver=solver))[0]


SLOW = pytest.mark.slow
POINTS = [pytest.param(name, mesh, marks=SLOW if (name, mesh) == ("resnet", (4, 2)) else (), id=f"{name}-{Mesh(mesh)}")
          for name, mesh in itertools.product(("mlp", "gpt2", "resnet"), MESHES)]


@pytest.mark.parametrize(("name", "mesh", "mode"), [
    pytest.param(*point.values, mode, marks=point.marks, id=f"{point.id}-{mode}")
    for point, mode in itertools.product(POINTS, [*MODES, *GRIDS]) if point.values[1] in GRIDS.get(mode, MESHES)
])
def test_a_plan_verifies(name: str, mesh: tuple[int, ...], mode: str) -> None:
    plan = planned(name, mesh, mode)
    seconds, nbytes = verify(plan, model_context(name, "bf16-mixed"), cluster(mesh))
    assert seconds == pytest.approx(plan.seconds.step, rel=AGREEMENT)
    assert nbytes == pytest.approx(plan.memory.total, rel=AGREEMENT)
    parts = plan.seconds.compute + plan.seconds.inline + plan.seconds.exposed + plan.seconds.optimizer
    assert parts == pytest.approx(plan.seconds.step, rel=1e-9)
    assert (plan.status, plan.gap, plan.fallback_ops) == ("Optimal", 0.0, ())


@pytest.mark.parametrize(("name", "mesh"), POINTS)
def test_no_mode_is_predicted_faster_than_auto(name: str, mesh: tuple[int, ...]) -> None:
    best = planned(name, mesh, "auto").seconds.step
    assert all(best <= planned(name, mesh, mode).seconds.step * (1 + 1e-9) for mode in [*MODES[1:], *GRIDS]
               if mesh in GRIDS.get(mode, MESHES))


@pytest.mark.parametrize(("name", "mesh"), POINTS)
def test_a_plan_is_written_and_read(name: str, mesh: tuple[int, ...], tmp_path: Path) -> None:
    plan = planned(name, mesh, "auto")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(("mode", "check"), [
    ("ddp", lambda plan: {p.storage for p in plan.parameters} == {"R"}),
    ("zero3", lambda plan: {p.storage for p in plan.parameters} == {"Z"}),
    ("1d", lambda plan: {p.storage for p in plan.parameters} > {"R"}),
])
def test_modes_decide_how_parameters_rest(mode: str, check: Callable[[Plan], bool]) -> None:
    assert check(planned("gpt2", (4,), mode))


def test_a_decision_comes_back_from_its_plan() -> None:
    context, mesh = model_context("gpt2", "bf16-mixed"), (2, 2)
    plan = planned("gpt2", mesh, "auto")
    decision = decision_of(plan, context)
    assert decision.mesh == Mesh(mesh)
    assert tuple(op.assignment for op in plan.ops) == decision.assignments
    sources = context.segmented.factored.program.sources
    assert {p.name: p.storage for p in plan.parameters} == {
        sources[n.name].name: str(s) for n, s in decision.storage.items()}


# Mesh shapes

@pytest.mark.parametrize(("mode", "size", "shapes"), [
    ("auto", 4, [(2, 2)]), ("ddp", 4, [(4,)]), ("1d", 8, [(8,)]), ("auto", 6, [(2, 3), (3, 2)]),
    ("auto", 1, [(1,)]), ("auto", 2, [(2,)]), ("auto", 8, [(2, 2, 2)]), ("auto", 12, [(2, 2, 3), (2, 3, 2), (3, 2, 2)]),
    ("auto", 32, [(4, 8), (8, 4), (2, 16), (16, 2)]), ("zero+1d", 8, [(2, 4), (4, 2)]),
])
def test_mesh_shapes_that_are_tried(mode: str, size: int, shapes: list[tuple[int, ...]]) -> None:
    assert list(shapes_for(Request("m", mode), cluster((size,)))) == shapes


def test_the_best_mesh_is_taken() -> None:
    context = model_context("mlp", "bf16-mixed")
    said: list[str] = []
    best = solve(context, cluster((4,)), Request("mlp"), said.append)[0]
    assert best.seconds.step == min(planned("mlp", mesh, "auto").seconds.step for mesh in [(4,), (2, 2)])
    told = [text.partition(":")[0] for text in said if "stages" not in text]
    assert told == ["mesh 2x2", "mesh 2x2"]  # its bound, then its plan


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
@pytest.mark.parametrize(("coarse", "fine"), [((4,), (2, 2)), ((6,), (3, 2)), ((2, 4), (2, 2, 2)), ((8,), (2, 2, 2))])
def test_a_mesh_is_never_worse_than_one_that_joins_its_axes(name: str, coarse: tuple[int, ...],
                                                            fine: tuple[int, ...]) -> None:
    assert planned(name, fine, "auto").seconds.step <= planned(name, coarse, "auto").seconds.step * (1 + 1e-9)


def test_no_mesh_that_was_tried_is_faster() -> None:
    context, where = model_context("gpt2", "bf16-mixed"), cluster((12,))
    best = solve(context, where, Request("gpt2"))[0].seconds.step
    for shape in shapes_for(Request("gpt2"), where):
        assert best <= solve(context, where, Request("gpt2", mesh=shape))[0].seconds.step * (1 + 1e-9)


@pytest.mark.parametrize(("request_", "message"), [
    (Request("m", mesh=(3,)), r"mesh 3 has 3 devices, cluster cpu:4 has 4; choose a mesh whose sizes multiply to 4"),
    (Request("m", mode="5d"), "unknown mode '5d'"),
    (Request("m", optimizer="lion"), "unknown optimizer 'lion'"),
    (Request("m", solver="gurobi"), "unknown solver 'gurobi'"),
])
def test_bad_requests_are_refused(request_: Request, message: str) -> None:
    with pytest.raises(AutoparError, match=message):
        solve(model_context("mlp", "bf16-mixed"), cluster((4,)), request_)


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(AutoparError, match=r"outputs have shapes \(4, 3\) and none is a scalar loss.*loss_fn="):
        keep_loss(raw(F.relu, torch.randn(4, 3)))


# Budgets

def test_the_budget_binds() -> None:
    context, where = model_context("gpt2", "bf16-mixed"), cluster((4,))
    free = planned("gpt2", (4,), "auto")
    with pytest.raises(Infeasible) as refusal:
        solve(context, where, Request("gpt2", mesh=(4,), memory_budget=1.0))
    assert refusal.value.least_budget_bytes is not None
    budget = (refusal.value.least_budget_bytes + free.memory.total) / 2
    tight, _ = solve(context, where, Request("gpt2", mesh=(4,), memory_budget=budget))
    assert tight.memory.total <= budget < free.memory.total
    assert tight.seconds.step >= free.seconds.step
    verify(tight, context, where)


def test_too_small_a_budget_says_what_is_needed() -> None:
    needs = r"needs \d+ bytes a device on mesh 2, the budget is 1000 bytes; raise the budget"
    with pytest.raises(Infeasible, match=needs) as refusal:
        solve(model_context("mlp", "bf16-mixed"), cluster((2,)), Request("mlp", memory_budget=1000.0))
    needed = float(str(refusal.value).partition("needs ")[2].partition(" bytes")[0])
    plan, _ = solve(model_context("mlp", "bf16-mixed"), cluster((2,)), Request("mlp", memory_budget=needed + 1))
    assert plan.memory.total <= needed + 1


# Plans that don't fit

def edited(change: Callable[[dict[str, Any]], Any]) -> Plan:
    data = copy.deepcopy(planned("mlp", (2,), "auto").to_json())
    change(data)
    return Plan.from_json(data)


def at(*path: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """`at("a", 0)(value)` changes data["a"][0]; a function is applied to what is there."""
    def to(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(data: dict[str, Any]) -> None:
            for key in path[:-1]:
                data = data[key]
            data[path[-1]] = value(data[path[-1]]) if callable(value) else value
        return change
    return to


@pytest.mark.parametrize(("change", "message"), [
    (at("step_time_s")(lambda s: 0.99 * s), "claims .* seconds"),
    (at("memory_bytes", "activations")(lambda b: b - 100.0), "claims .* bytes"),
    (at("ops", 0, "assignment")(lambda a: ["R"] if a != ["R"] else ["e0"]), "claims .* seconds|claims .* bytes"),
    (at("parameters", 0, "storage")(lambda s: "R" if s != "R" else "Z"), "claims .* seconds|claims .* bytes"),
    (at("program_key")("0" * 12), "is for program 000000000000"),
    (at("cluster_key")("0" * 12), "is for cluster cpu:2 .000000000000."),
    (at("mode")("5d"), "unknown mode '5d'"),
    (at("optimizer")("lion"), "unknown optimizer 'lion'"),
    (at("mesh")([3]), "choose a mesh"),
    (at("ops")(lambda ops: ops[1:]), "is for another model"),
    (at("parameters", 0, "name")("nobody"), "is for another model.*nobody"),
    (at("ops", 0, "assignment")(["nonsense"]), "assignment of op .* is 'nonsense', which is none of its .* such as e0"),
    (at("ops", 0, "assignment")([]), r"assignment.* of op .* is \[\], needed is an entry for each of the 1 axes"),
    (at("ops", 0, "assignment")(["R", "R"]), r"assignment.* of op .* is \['R', 'R'\], needed is an entry for each"),
    (at("parameters", 0, "storage")("7"), "storage of parameter .* is '7', which is none of its .* such as R; Z"),
    (at("parameters", 0, "storage")("?"), "storage of parameter .* is '?'"),
    (at("parameters", 0, "storage")("R,R"), "storage of parameter .* is 'R,R'"),
])
def test_an_edited_plan_is_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(AutoparError, match=message):
        verify(edited(change), model_context("mlp", "bf16-mixed"), cluster((2,)))


def test_a_layer_edited_on_its_own_is_seen() -> None:
    """Equal layers are lowered once only while they are decided alike."""
    data = planned("gpt2", (2,), "zero3").to_json()
    op = next(op for op in data["ops"] if op["name"] == "transformer_h_1_mlp_c_fc")
    op["assignment"] = ["R"]
    with pytest.raises(AutoparError, match=r"claims .* seconds"):
        verify(Plan.from_json(data), model_context("gpt2", "bf16-mixed"), cluster((2,)))


def test_a_plan_for_another_model_is_refused() -> None:
    plan = planned("mlp", (2,), "auto")
    for other, said in ((model_context("gpt2", "bf16-mixed"), "plan is for program"),
                        (model_context("mlp", "fp32"), "captured in fp32; capture it by .*precision='bf16-mixed'")):
        with pytest.raises(AutoparError, match=said):
            verify(plan, other, cluster((2,)))
    with pytest.raises(AutoparError, match="the plan is for another model: ops it does not know"):
        decision_of(plan, model_context("gpt2", "bf16-mixed"))


def test_a_plan_for_another_cluster_is_refused() -> None:
    with pytest.raises(AutoparError, match=r"plan is for cluster cpu:2 .*, this is 2xH100"):
        verify(planned("mlp", (2,), "auto"), model_context("mlp", "bf16-mixed"), Cluster.preset("2xH100"))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda text: text[:len(text) // 2], "is not JSON .* cut short"),
    (lambda text: "", "is not JSON"),
    (lambda text: "[1]", "holds a list"),
    (lambda text: text.replace('"gap"', '"gape"'), "'gap' is missing"),
    (lambda text: text.replace(FORMAT, "autopar plan 0"), "'format' is 'autopar plan 0'"),
    (lambda text: text.replace('"nodes":', '"nodes": "many", "was":'), "'nodes' is 'many'"),
])
def test_a_damaged_file_is_refused(damage: Callable[[str], str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned("mlp", (2,), "auto").save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(AutoparError, match=message):
        Plan.load(path)


# Random models and settings

def perceptron(generator: random.Random) -> tuple[nn.Module, Tensor]:
    sizes = [generator.choice([3, 4, 6, 8, 16]) for _ in range(generator.randint(2, 5))]
    layers = [nn.Linear(a, b, bias=generator.random() < 0.5) for a, b in itertools.pairwise(sizes)]
    between = [generator.choice([nn.ReLU, nn.GELU, nn.Identity, lambda: nn.Softmax(-1)])() for _ in layers]
    norm = nn.LayerNorm(sizes[-1]) if generator.random() < 0.5 else nn.Identity()
    return nn.Sequential(*itertools.chain(*zip(layers, between, strict=True)), norm), torch.randn(8, sizes[0])


def pyramid(generator: random.Random) -> tuple[nn.Module, Tensor]:
    sizes = [generator.choice([2, 3, 4, 8]) for _ in range(generator.randint(2, 4))]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        convolution = nn.Conv2d(a, b, generator.choice([1, 3]), generator.choice([1, 2]), 1)
        layers += [convolution, nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(8, sizes[0], 9, 9)


@pytest.mark.parametrize("seed", range(20))
def test_random_models_verify(seed: int) -> None:
    generator = random.Random(seed)
    model, inputs = generator.choice([perceptron, pyramid])(generator)
    call = ((inputs, torch.randint(0, 2, (8,))), {})
    precision = generator.choice(["fp32", "bf16-mixed", "bf16"])
    context = prepare(capture(model, call, precision, F.cross_entropy))  # type: ignore[arg-type]
    where = Cluster.preset(generator.choice(["cpu:2", "cpu:4", "4xA100-80GB", "2x2xH100", "2xV100"]))
    optimizer = generator.choice(["adamw", "sgd", "momentum"])
    seconds = {}
    for mode in MODES:
        plan, _ = solve(context, where, Request("random", mode, optimizer=optimizer, solver="highs"))
        found = verify(plan, context, where)
        assert found == pytest.approx((plan.seconds.step, plan.memory.total), rel=AGREEMENT)
        seconds[mode] = plan.seconds.step
    assert all(seconds["auto"] <= other * (1 + 1e-9) for other in seconds.values())


def test_ops_without_a_rule_are_named() -> None:
    def call(t: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(t, weight) + t.trace(), torch.zeros(8, dtype=torch.long, device=t.device))
    plan, _ = solve(annotated(call, torch.randn(8, 4), nn.Parameter(torch.randn(4, 4))), cluster((2,)), Request("m"))
    assert plan.fallback_ops == ("trace (trace.default)",)
    assert "replicated for want of a rule: trace" in str(plan)


def test_a_plan_prints_what_it_decides() -> None:
    text = str(planned("gpt2", (4,), "zero3"))
    assert "transformer_h_0_attn_c_attn                        S0R = S0R X RR" in text
    assert "mesh: 4 of cpu:4, mode zero3, bf16-mixed, adamw" in text
    assert "attention: causal" in text
