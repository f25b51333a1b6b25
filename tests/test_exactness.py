"""Loss and every gradient equal the one-process plain model's, on real ranks, in every mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class PartlyUsed(nn.Module):
    """Parameters that no output, and that only an output beside the loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 8)
        self.unused, self.beside = nn.Linear(16, 16), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x).relu()
        return {"loss": F.cross_entropy(self.last(hidden), labels), "other": hidden * self.beside}


def without_gradient(rank: int, world_size: int, options: dict[str, Any]) -> set[str]:
    torch.manual_seed(0)
    model = autopar.compile(PartlyUsed(), quick(world_size), precision="fp32", **options)
    model(torch.randn(8, 16), torch.arange(8))["loss"].backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize("options", [{"mode": "2d", "mesh": (2, 2)}, {"mode": "zero3"}, {"mode": "auto"}], ids=str)
def test_what_is_not_used_has_no_gradient(pool: Any, options: dict[str, Any]) -> None:
    for found in pool(4).run(without_gradient, options):
        assert found == {"unused.weight", "unused.bias", "beside"}


def normalised() -> nn.Module:
    """Linear layers right before batch norms, which take away what their biases add."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32),
                         nn.ReLU(), nn.Linear(32, 8))


def on_one_rank(rank: int, world_size: int) -> dict[str, float]:
    """The worst error of `check` by mode."""
    return {mode: max(check(rank, world_size, "gpt2", {"mode": mode}, local=False)) for mode in ("1d", "zero3")}


def test_modes_on_one_rank(pool: Any) -> None:
    """What ranks would exchange, one has already."""
    found = pool(1).run(on_one_rank)[0]
    assert max(found.values()) < TOLERANCE, found


def rounding(rank: int, world_size: int, x: Tensor, labels: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    model = autopar.compile(normalised(), quick(world_size), inputs=(x, labels), loss_fn=F.cross_entropy,
                            precision="fp32", **options)
    model(x, labels).backward()
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", ["ddp", "1d"])
def test_gradients_that_are_nothing_but_rounding(pool: Any, mode: str) -> None:
    """They are 0 in exact numbers, so no order of sums is right: ours is as near to 0 as other orders of the batch are
    in one process."""
    generator = torch.Generator().manual_seed(5)
    x, labels = torch.randn(64, 16, generator=generator), torch.randint(0, 8, (64,), generator=generator)
    found = pool(2).run(rounding, x, labels, {"mode": mode})[0]
    for name in ("0.bias", "3.bias"):
        orders = [torch.arange(64), *(torch.randperm(64, generator=generator) for _ in range(8))]
        assert float(found[name].abs().max()) <= 2 * max(plain_rounding(x[o], labels[o], name) for o in orders)
        assert plain_rounding(x.double(), labels, name) < 1e-15


def plain_rounding(x: Tensor, labels: Tensor, name: str) -> float:
    model = normalised().to(x.dtype)
    F.cross_entropy(model(x), labels).backward()
    return float(model.get_parameter(name).grad.abs().max())
