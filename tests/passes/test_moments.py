"""Moments of whole programs: the fullest of them is the fullest segment, whichever decision is taken."""

from __future__ import annotations

import random

import pytest

from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.core.sharding import held_bytes
from autopar.passes.costs import OPTIMIZERS
from autopar.passes.modes import MODES
from autopar.passes.moments import held, uses
from autopar.passes.outline import outline
from autopar.passes.problem import Problem, Setting, build
from autopar.passes.strategies import parse_storage
from tests.programs import model_context


def every_segment(problem: Problem, taken: tuple[int, ...]) -> float:
    """The fullest backward of all segments, one by one."""
    ctx, made = problem.context, outline(problem.context)
    chosen = [node.choices[c] for node, c in zip(problem.instance.nodes, taken, strict=True)]
    parameters, where = problem.parameter_nodes, uses(ctx)
    rest = sum(chosen[n].nbytes for n in parameters.values())
    found = []
    for place, segment in enumerate(ctx.segmented.segments):
        ops = [chosen[problem.op_nodes[i]] for s in ctx.segmented.segments[:place + 1] for i in s.ops]
        here = [chosen[n].working for node, n in parameters.items() if node in segment.externals]
        found.append(rest + sum(op.saved for op in ops) + sum(here)
                     + max(chosen[problem.op_nodes[i]].working for i in segment.ops)
                     + sum(chosen[n].saved for node, n in parameters.items() if where[node].first <= place)
                     + sum(chosen[n].gradient for node, n in parameters.items() if where[node].last >= place))
    assert set(made.users) == set(parameters)
    return max(found)


@pytest.mark.parametrize("name", ["mlp", "gpt2", "resnet"])
def test_no_segment_is_fuller_than_the_fullest_moment(name: str) -> None:
    where = Setting(Mesh((2, 2)), Cluster.preset("cpu:4"), MODES["auto"], OPTIMIZERS["adamw"])
    problem, generator = build(model_context(name, "bf16-mixed"), where), random.Random(3)
    for _ in range(20):
        taken = tuple(generator.randrange(len(node.choices)) for node in problem.instance.nodes)
        assert held_bytes(problem.instance, taken) == pytest.approx(every_segment(problem, taken), rel=1e-12)


@pytest.mark.parametrize(("precision", "text", "wanted"), [
    ("fp32", "R", (4, 8, 0, 4, 0)), ("bf16-mixed", "R", (4, 8, 2, 4, 0)),
    ("fp32", "Z", (2, 4, 0, 2, 2 * 4 + 4)), ("bf16-mixed", "Z", (2, 4, 0, 2, 2 * 2 + 4)),
    ("fp32", "K", (2, 4, 4, 2, 4)), ("bf16-mixed", "K", (2, 4, 2, 2, 4)),
    ("fp32", "0", (2, 4, 0, 2, 0)), ("bf16-mixed", "0", (2, 4, 1, 2, 0)),
])
def test_bytes_of_a_parameter(precision: str, text: str, wanted: tuple[float, ...]) -> None:
    """Per element of the whole, on two devices: itself and AdamW's state, the copy to compute with, the gradient."""
    ctx = model_context("mlp", precision)  # type: ignore[arg-type]
    node = next(n for n in ctx.parameters() if n.meta["val"].ndim == 2)
    found = held(ctx, node, parse_storage(text), Mesh((2,)), OPTIMIZERS["adamw"].state_bytes)
    elements = node.meta["val"].numel()
    assert (found.parameter, found.state, found.copy, found.gradient, found.working) == tuple(
        elements * nbytes for nbytes in wanted)
