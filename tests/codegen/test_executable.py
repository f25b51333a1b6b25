"""Lowered programs on one process: the plain model's loss, each class of segments once, values freed when read."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from autopar.api import arguments
from autopar.codegen.executable import Executable, Turn, batch_spec, build, offline, seeds_of
from autopar.codegen.lower import Target
from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.passes.capture import Precision, capture
from autopar.passes.decision import Context, Decision
from autopar.passes.strategies import parse_storage
from autopar.planner import Request, decision_of, prepare, solve
from tests.builders import Case
from tests.programs import MODELS, model_context
from tests.simulator import CPU, materials, run

ALONE = Mesh((1,))


def decided(context: Context, storage: str = "R") -> Decision:
    """Everything whole on one device."""
    stored = {node: parse_storage(storage) for node in context.parameters()}
    return Decision(context, ALONE, tuple(("R",) for _ in context.segmented.ops), stored)


def executable(decision: Decision) -> Executable:
    price = Cluster.preset(f"cpu:{decision.mesh.size}").pricer(decision.mesh)
    return build(Target(decision, offline(decision.mesh), price, CPU))


@torch.no_grad()
def loss(found: Executable, case: Case) -> float:
    """Of a call; parameters are as they rest, in fp32, all else in the compute dtype."""
    context = found.decision.context
    nodes = {n.name: n for n in context.segmented.factored.program.graph.nodes}
    material = {nodes[name]: x for name, x in materials(context, case.model, case.inputs).items()}
    given = {n: x.clone() if n in found.decision.storage else x.to(n.meta["val"].dtype) for n, x in material.items()}
    return float(run(found, given, 0)[0])


@torch.no_grad()
def plain(case: Case) -> float:
    return float(case.plain_loss(case.model))


@pytest.mark.parametrize("storage", ["R", "Z", "0"])
@pytest.mark.parametrize(("name", "precision", "tolerance"), [
    ("mlp", "fp32", 1e-6), ("gpt2", "fp32", 1e-6), ("resnet", "fp32", 1e-5), ("mlp", "bf16-mixed", 2e-2),
    ("gpt2", "bf16-mixed", 2e-2), ("resnet", "bf16-mixed", 5e-2),
])
def test_on_one_device_the_loss_is_the_plain_model_s(name: str, precision: Precision, tolerance: float,
                                                     storage: str) -> None:
    case, context = MODELS[name](), model_context(name, precision)
    assert loss(executable(decided(context, storage)), case) == pytest.approx(plain(case), rel=tolerance)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16-mixed", 5e-2)])
def test_evaluation_programs_use_running_statistics(precision: Precision, tolerance: float) -> None:
    case = MODELS["resnet"]()
    case.plain_loss(case.model)
    context = prepare(capture(case.model.eval(), arguments(case.inputs), precision, case.loss_fn))
    assert loss(executable(decided(context)), case) == pytest.approx(plain(case), rel=tolerance)


def test_a_solved_plan_on_one_device_is_the_plain_model() -> None:
    context = model_context("gpt2")
    plan, _ = solve(context, Cluster.preset("cpu:1"), Request("gpt2"))
    assert plan.seconds.inline == plan.seconds.exposed == 0.0
    case = MODELS["gpt2"]()
    assert loss(executable(decision_of(plan, context)), case) == pytest.approx(plain(case), rel=1e-6)


def test_equal_segments_share_their_module() -> None:
    found = executable(decided(model_context("gpt2")))
    modules = Counter(id(call.lowered) for call in found.calls)
    names = {call.segment.name: modules[id(call.lowered)] for call in found.calls}
    assert names["transformer_h_0"] == names["transformer_h_1"] == 2
    assert set(names.values()) == {1, 2}


def test_equal_segments_that_are_decided_differently_do_not() -> None:
    decision = decided(model_context("gpt2"))
    segment = next(s for s in decision.context.segmented.segments if s.name == "transformer_h_1")
    index = next(i for i in segment.ops if decision.context.segmented.ops[i].name.endswith("mlp_c_fc"))
    changed = tuple(("m_0",) if i == index else a for i, a in enumerate(decision.assignments))
    found = executable(Decision(decision.context, ALONE, changed, decision.storage))
    assert len({id(call.lowered) for call in found.calls}) == len(found.calls)


@pytest.mark.parametrize("name", MODELS)
def test_values_are_freed_once_after_they_are_last_read(name: str) -> None:
    found = executable(decided(model_context(name)))
    freed = [node for nodes in found.freed for node in nodes]
    assert len(set(freed)) == len(freed)
    for i, nodes in enumerate(found.freed):
        later = {n for call in found.calls[i + 1:] for n in call.segment.externals}
        assert not later & set(nodes)
    read = {n for call in found.calls for n in call.segment.externals}
    assert read | {n for call in found.calls for n in call.exports} == set(freed)


def test_offline_groups_cover_every_set_of_axes() -> None:
    found = offline(Mesh((2, 3, 2)))
    assert {axes: group.size for axes, group in found.groups.items()} == {
        (): 1, (0,): 2, (1,): 3, (2,): 2, (0, 1): 6, (0, 2): 4, (1, 2): 6, (0, 1, 2): 12}
    assert {group.index for group in found.groups.values()} == {0}


def test_batch_spec_and_seeds() -> None:
    assert [str(batch_spec(3, (0, 1))), str(batch_spec(1, (0,)))] == ["S01RR", "S0"]
    seeds = [seed for base in (0, 1, 7) for step in range(50) for seed in seeds_of(Turn(base, step), 100, CPU)]
    assert len({int(seed) for seed in seeds}) == len(seeds)
    assert all(seed.data_ptr() % 16 == 0 for seed in seeds)
