"""Plans as text and as JSON, from one made by hand."""

from __future__ import annotations

import json

import pytest

from autopar.comparison import Comparison
from autopar.console.report import as_json, as_text
from autopar.plan import Plan
from autopar.planned import Bytes, PlannedOp, PlannedParameter, Seconds, Workload

PLAN = Plan(
    "m.py:f", "0" * 12, "cpu:2", "1" * 12, (2,), "auto", "fp32", "sgd", "Optimal", 0.0,
    Seconds(0.10, 0.05, 0.03, 0.02, 0.0), Bytes(1.0, 2.0, 3.0, 4.0, 5.0),
    (PlannedOp("layer1_0_conv1", "layer1_0", ("n",), "S0R = S0R X RR"), PlannedOp("made", "layer1_0", ("R",), "")),
    (PlannedParameter("layer1.0.conv1.weight", "R", "RRRR"),), "causal", ("odd (odd.default)",), 3, 2, 1.5,
    Workload(8, None, 6e9), 1e12)


def test_text_has_status_graph_ops_and_summary_in_order() -> None:
    lines = as_text(PLAN).splitlines()
    assert lines[:4] == ["ILP Status: Optimal  Objective: 0.100000 s  Time: 1.50 s", "#nodes: 3, #edges: 2",
                         "layer1_0_conv1  S0R = S0R X RR", ""]
    assert "\n".join(lines[4:]) == PLAN.summary()


def test_json_is_one_object_of_numbers() -> None:
    compared = Comparison(PLAN, None, {"auto": 0.1, "3d": None}, {"3d": "wants a cube"})  # type: ignore[arg-type]
    found = json.loads(as_json(compared, 9.0))
    assert found.pop("memory_bytes") == {"parameters": 1.0, "gradients": 2.0, "optimizer": 3.0, "activations": 4.0,
                                         "transient": 5.0, "peak": 15.0, "device": 15.0}
    assert found == {
        **{name: value for name, value in PLAN.to_json().items() if name != "memory_bytes"}, "total_s": 9.0,
        "step_time_s": pytest.approx(0.1), "communication_s": pytest.approx(0.05), "mesh": [2], "tokens_per_s": None,
        "samples_per_s": pytest.approx(80.0), "mfu": pytest.approx(0.06), "fallback_ops": ["odd (odd.default)"],
        "modes": {"auto": 0.1, "3d": None}, "modes_reason": {"3d": "wants a cube"},
        "ops": [{"name": "layer1_0_conv1", "strategy": "S0R = S0R X RR", "segment": "layer1_0", "assignment": ["n"]}]}
