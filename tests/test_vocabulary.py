"""Vocabularies that are cut, on real ranks: loss and every gradient equal the plain model's, logits stay cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import autopar
from tests.builders import CASES, quick
from tests.families import family
from tests.test_exactness import TOLERANCE, gradient_errors

pytestmark = pytest.mark.dist
TABLE = {"gpt2": "transformer_wte", "llama": "model_embed_tokens"}


def padded(labels: torch.Tensor) -> torch.Tensor:
    """Labels of which the first half of the batch has nearly none, the second all."""
    labels = labels.clone()
    labels[:len(labels) // 2, 2:] = -100
    return labels


def check(rank: int, world_size: int, name: str, options: dict[str, Any]) -> tuple[float, float, dict[str, str]]:
    """(loss error, worst gradient error, strategy by op) of one step on padded labels."""
    case = CASES[name]() if name in CASES else family(name)
    assert isinstance(case.inputs, dict)
    inputs = {**case.inputs, "labels": padded(case.inputs["labels"])}
    reference = copy.deepcopy(case.model)
    expected = reference(**inputs).loss
    expected.backward()
    model = autopar.compile(case.model, quick(world_size), inputs=inputs, precision="fp32", **options)
    loss = model(**inputs).loss
    loss.backward()
    taken = {op.name: op.strategy for op in model.plan.ops}
    return abs(float(loss) - float(expected)), max(gradient_errors(model, reference).values()), taken


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize(("ranks", "options", "loss", "table"), [
    (2, {"mode": "1d"}, "R(P0) = RS0", "RRR(P0) = S0R"),
    (4, {"mode": "zero+1d", "mesh": (2, 2)}, "R(P01) = S0S1", "S0RR(P1) = S1R"),
], ids=["2-1d", "4-zero+1d"])
def test_rows_and_classes_are_cut(pool: Any, name: str, ranks: int, options: dict[str, Any], loss: str,
                                  table: str) -> None:
    pins = {"cross_entropy_loss": loss, TABLE[name]: table}
    for loss_error, gradient_error, taken in pool(ranks).run(check, name, {**options, "pins": pins}):
        assert loss_error <= TOLERANCE
        assert gradient_error <= TOLERANCE
        assert {op: taken[op] for op in pins} == pins
        assert "S" in taken["lm_head"].partition(" =")[0][1 if ranks == 2 else 2:]


def test_1d_cuts_classes_unasked(pool: Any) -> None:
    for loss_error, gradient_error, taken in pool(2).run(check, "llama", {"mode": "1d"}):
        assert max(loss_error, gradient_error) <= TOLERANCE
        assert taken["cross_entropy_loss"] == "R(P0) = RS0"
