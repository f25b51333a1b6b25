"""Loss and every gradient equal the one-process plain model's, on real ranks, in every mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import Tensor, nn

import autopar
from tests.builders import CASES, quick
from tests.families import FAMILIES, family

pytestmark = pytest.mark.dist
TOLERANCE = 1e-5
FLOOR = 1e-3
MODES = [("ddp", None), ("zero2", None), ("zero3", None), ("1d", None), ("sequence", None), ("auto", None)]
ON_TWO_AXES = [("auto", (2, 2)), ("zero+1d", (2, 2)), ("2d", (2, 2))]


def whole(tensor: Tensor) -> Tensor:
    """The full value of a plain tensor or DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradient_errors(model: nn.Module, reference: nn.Module) -> dict[str, float]:
    """|g - g_ref| over max(|g_ref|, FLOOR of the largest gradient of all), by parameter."""
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    found = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(expected), set(found) ^ set(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    return {n: float((found[n].reshape(g.shape) - g).abs().max()) / max(float(g.abs().max()), FLOOR * largest)
            for n, g in expected.items()}


def check(rank: int, world_size: int, case_name: str, options: dict[str, Any],
          local: bool) -> tuple[float, float, float]:
    """(loss error, worst gradient error, worst buffer error) of one compiled step."""
    case = CASES[case_name]() if case_name in CASES else family(case_name)
    reference = copy.deepcopy(case.model)
    expected = case.plain_loss(reference)
    expected.backward()
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn, precision="fp32",
                            **options)
    loss = case.call(model, case.part(rank, world_size) if local else None)
    loss.backward()
    buffers = zip(model.named_buffers(), reference.named_buffers(), strict=True)
    moved = max((float((b.float() - r.float()).abs().max()) for (_, b), (_, r) in buffers), default=0.0)
    return abs(float(loss) - float(expected)), max(gradient_errors(model, reference).values()), moved


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize(("mode", "mesh"), MODES + ON_TWO_AXES, ids=str)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_step_equals_the_plain_models(pool: Any, name: str, world_size: int, mode: str, mesh: Any, local: bool) -> None:
    if mesh is not None and world_size != 4:
        pytest.skip("a (2, 2) mesh has four ranks")
    options = {"mode": mode, "mesh": mesh}
    for loss_error, gradient_error, buffer_error in pool(world_size).run(check, name, options, local):
        assert loss_error <= TOLERANCE
        assert gradient_error <= TOLERANCE
        assert buffer_error <= TOLERANCE


def test_zero1_equals_the_plain_model(pool: Any) -> None:
    """Its plans are zero2's; that the mode is taken is what is left to see."""
    assert max(max(errors) for errors in pool(2).run(check, "mlp", {"mode": "zero1"}, False)) <= TOLERANCE


@pytest.mark.parametrize("mode", ["ddp", "zero3", "1d", "auto"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_as_their_authors_wrote_them(pool: Any, name: str, mode: str) -> None:
    for loss_error, gradient_error, _ in pool(2).run(check, name, {"mode": mode, "solver": "highs"}, False):
        assert loss_error <= TOLERANCE
        assert gradient_error <= TOLERANCE
