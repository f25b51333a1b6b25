"""Heads in chunks on real ranks: loss and every gradient equal the plain model's, whatever is cut."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest

import autopar
from autopar.core import chunks
from tests.builders import CASES, quick
from tests.families import family
from tests.test_exactness import TOLERANCE, gradient_errors
from tests.test_vocabulary import padded

pytestmark = pytest.mark.dist
OP = "linear_cross_entropy"


def check(rank: int, world_size: int, name: str, options: dict[str, Any], at_once: int) -> tuple[float, float, str]:
    """(loss error, worst gradient error, strategy of the head) of a step on padded labels, and of an evaluation."""
    case = CASES[name]() if name in CASES else family(name)
    assert isinstance(case.inputs, dict)
    inputs = {**case.inputs, "labels": padded(case.inputs["labels"])}
    reference = copy.deepcopy(case.model)
    expected = reference(**inputs).loss
    expected.backward()
    with mock.patch.multiple(chunks, LEAST_ELEMENTS=1, LEAST_ROWS=1, CHUNKS=128, _ALIGNED=at_once):
        model = autopar.compile(case.model, quick(world_size), inputs=inputs, precision="fp32", head="chunked",
                                **options)
        loss = model(**inputs).loss
        (loss / 2).backward(retain_graph=True)
        (loss / 2).backward()
        gradient = max(gradient_errors(model, reference).values())
        quiet = float(model.eval()(**inputs).loss)
    error = max(abs(each - float(expected)) for each in (float(loss), quiet))
    return error, gradient, {op.name: op.strategy for op in model.plan.ops}[OP]


@pytest.mark.parametrize(("ranks", "name", "options", "strategy"), [
    (2, "gpt2", {"mode": "ddp"}, "R(P0) = S0R, RR"),
    (2, "llama", {"mode": "1d"}, "R(P0) = RR, S0R"),
    (2, "bert", {"mode": "1d", "pins": {OP: "R(P0) = RR, S0R, S0"}}, "R(P0) = RR, S0R, S0"),
    (4, "gpt2", {"mode": "zero+1d", "mesh": (2, 2), "pins": {OP: "R(P01) = S0R, S1R"}}, "R(P01) = S0R, S1R"),
    (4, "llama", {"mode": "zero3"}, "R(P0) = S0R, RR"),
], ids=["2-gpt2-ddp", "2-llama-1d", "2-bert-1d", "4-gpt2-zero+1d", "4-llama-zero3"])
def test_loss_and_gradients_are_the_plain_models(pool: Any, ranks: int, name: str, options: dict[str, Any],
                                                 strategy: str) -> None:
    for loss_error, gradient_error, taken in pool(ranks).run(check, name, options, 12):
        assert loss_error <= TOLERANCE
        assert gradient_error <= TOLERANCE
        assert taken == strategy


def batches(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    """The losses of a batch that does not divide over the ranks, and of one that does: found and expected."""
    case = CASES["gpt2"](batch=5)
    expected = [float(case.model(**inputs).loss) for inputs in (case.inputs, CASES["gpt2"]().inputs)]
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, precision="fp32", head="chunked",
                            mode="ddp")
    return [float(model(**inputs).loss) for inputs in (case.inputs, CASES["gpt2"]().inputs)], expected


def test_a_batch_that_does_not_divide_is_filled_up(pool: Any) -> None:
    for found, expected in pool(2).run(batches):
        assert found == pytest.approx(expected, rel=1e-6)
