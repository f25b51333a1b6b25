"""Ways to run decisions, told together and one by one."""

from __future__ import annotations

import math
from dataclasses import replace

from autopar.budget import Lowerings, recomputing
from autopar.core.sharding import price
from autopar.passes.problem import Problem, build
from autopar.planner import Request
from autopar.solver.optimise import optimise
from tests.builders import quick
from tests.programs import model_context


def two_alike(problem: Problem) -> list[tuple[int, ...]]:
    """The fastest choices, and those in which the last norm's weight rests otherwise."""
    first = optimise(problem.instance, "highs").choices
    place = next(n for n, node in enumerate(problem.instance.nodes) if node.name == "transformer.ln_f.weight")
    others = [(*first[:place], c, *first[place + 1:]) for c in range(len(problem.instance.nodes[place].choices))]
    return [first, next(each for each in others if each != first and price(problem.instance, each).seconds < math.inf)]


def test_what_decisions_have_in_common_is_lowered_once_and_comes_to_the_same() -> None:
    context, setting = model_context("gpt2"), Request("gpt2").setting(quick(2), (2,))
    problem = build(context, setting)
    first, decision = (problem.decide(choices) for choices in two_alike(problem))
    shared, own = Lowerings(), Lowerings()
    shared.plain(first, setting)
    tight = replace(setting, budget=0.9 * own.plain(decision, setting).device)
    together, alone = (recomputing(decision, tight, lowerings, "highs") for lowerings in (shared, own))
    assert (together.priced, together.memory, together.bound) == (alone.priced, alone.memory, alone.bound)
    assert together.executable.decision.kept == alone.executable.decision.kept
    assert len(shared.segments) < 2 * len(own.segments)
