"""benchmarks/mapping.py: what goes between hosts, what a case comes to, and random clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.solver.mapping import place, price

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_a_case_and_random_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import drawn
    import mapping
    case = next(case for case in mapping.CASES if case.name == "two hosts 0,1,0,1")
    found = dict(mapping.layouts(case))
    default, solver = (mapping.outcome(case, found[name]) for name in ("default", "solver"))
    assert price(case.instance(), found["solver"]) == price(case.instance(), found["exhaustive"])
    assert solver.step_s < default.step_s and solver.between_bytes < default.between_bytes
    each = 2.0 * mapping.TOKENS * mapping.WIDTH  # of two columns one crosses, forth and back, in every micro-batch
    gradients = case.instance().collectives[0].nbytes
    inside = mapping.crossing(case.instance(), 16, (0, 2, 1, 3))
    assert inside == pytest.approx(2 * 16 * each * 2)
    assert mapping.crossing(case.instance(), 16, (0, 1, 2, 3)) == pytest.approx(2 * 2 * 2 * 0.5 * gradients)
    for seed in range(4):
        placed = place(drawn.instance(seed, 6))
        assert placed.gap == 0.0
