"""No mode is predicted faster than auto: every model by name on four clusters.

Slow, as models have their full size; `tests/test_planner.py` asserts the same of tiny ones.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

from autopar.comparison import compare
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError, Infeasible
from autopar.models.catalog import MODELS
from autopar.models.registry import build
from autopar.passes.capture import capture
from autopar.passes.decision import Context
from autopar.passes.modes import MODES
from autopar.planner import Request, prepare, solve

BATCH, SEQ = 64, 512
CLUSTERS = ("4xRTX-4090", "8xA100-80GB", "2x8xH100", "8x8xA100-40GB")
ROUNDING = 1e-9


@lru_cache(maxsize=1)
def traced(name: str) -> Context:
    built = build(name, BATCH, SEQ if MODELS[name].longest else None)
    return prepare(capture(built.model, built.call, "bf16-mixed", built.loss_fn))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("name", MODELS)
def test_no_mode_is_predicted_faster_than_auto(name: str, cluster: str) -> None:
    """Where auto does not fit, nothing does."""
    where, request = Cluster.preset(cluster), Request(name, solver="highs")
    try:
        found = compare(traced(name), where, request)
    except Infeasible:
        for mode in MODES:
            with pytest.raises(AutoparError):
                solve(traced(name), where, Request(name, mode, solver="highs"))
        return
    seconds = {mode: s for mode, s in found.seconds.items() if s is not None}
    assert found.plan.mode == "auto" and found.plan.step_time_s == seconds["auto"]
    assert all(seconds["auto"] <= s * (1 + ROUNDING) for s in seconds.values())
    assert set(seconds) | set(found.reasons) == set(MODES)
