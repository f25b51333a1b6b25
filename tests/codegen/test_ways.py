"""Bytes of segments that are cut as a plan says: what is told from their graphs is what a device holds."""

from __future__ import annotations

import pytest
import torch

from autopar.codegen.arrivals import Arrival, arrivals
from autopar.codegen.compiled import CutSegment
from autopar.codegen.footprint import ends_of
from autopar.codegen.joint import Cut
from autopar.codegen.live import Live
from autopar.codegen.ways import ways_of
from autopar.planner import Request, decision_of, setting_of, solve
from autopar.solver.checkpoint import menu
from tests.builders import quick
from tests.codegen.test_footprint import lowered
from tests.programs import model_context

CPU = torch.device("cpu")
FEW = 64
"""Bytes of losses and seeds."""


def measured(run: CutSegment, given: tuple[Arrival, ...]) -> list[tuple[int, int]]:
    """(most, at the start) of a second forward and its backward, whose results are held as a tape does."""
    arguments = [each.blank(CPU) for each in given] + [torch.zeros((), dtype=torch.int64)]
    leaves = [x for x in arguments if x.requires_grad]
    found = []
    for _ in range(2):
        with Live("cpu") as live:
            live.hold(arguments)
            start = live.bytes
            results = list(run(*arguments))
            forward = live.peak
            loss = ends_of(results)
            assert loss is not None
            live.restart()
            torch.autograd.grad(loss, leaves, allow_unused=True)
            found = [(forward, start), (live.peak, start)]
    return found


@pytest.mark.parametrize(("name", "slack"), [("gpt2", 0.02), pytest.param("resnet", 0.15, marks=pytest.mark.slow)])
def test_no_more_on_a_device_and_hardly_less(name: str, slack: float) -> None:
    mode, mesh = "ddp", (2,)
    shadow, real = lowered(name, mode, mesh, "meta"), lowered(name, mode, mesh, "cpu")
    plan, _ = solve(model_context(name), quick(2), Request(name, mode, mesh, solver="highs"))
    assert decision_of(plan, model_context(name)).storage.keys() == shadow.decision.storage.keys()
    ways = ways_of(shadow, setting_of(plan, quick(2)))
    seen, less = set[int](), 0
    for place, call in enumerate(real.calls):
        if id(call.lowered) in seen or ways.retained[place].joint is None:
            continue
        seen.add(id(call.lowered))
        fewest, *_, most = (*menu(ways.retained[place].local, 0.1, "highs", 3)[::-1],) * 2
        for kept in (fewest.names, most.names):
            told = ways.footprint(place, kept)
            given = arrivals(call.lowered, real.decision, {})
            held = [most - at_start for most, at_start in measured(CutSegment(call.lowered, Cut(kept)), given)]
            read = sum(told.results_bytes[i] for i in told.results)
            expected = told.forward, told.backward - read + sum(told.results_bytes)
            for said, seen_ in zip(expected, held, strict=True):
                assert seen_ <= said + FEW and said <= seen_ * (1.0 + slack), (call.segment.name, kept, expected, held)
        less += ways.footprint(place, fewest.names).saved < ways.footprint(place, None).saved
    assert less
