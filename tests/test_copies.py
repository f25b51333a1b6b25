"""Compiled models that are copied, as for averages of weights, and what is said where they are pickled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import autopar
from tests.builders import Case, mlp, quick
from tests.test_exactness import whole

pytestmark = pytest.mark.dist
STEPS, TOLERANCE = 3, 1e-5


def averaging(model: nn.Module, average: Any, case: Case, loss_of: Any) -> list[float]:
    """Losses of training, and of an average of the weights beside it, which is a copy of the model."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(STEPS):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(average, AveragedModel):
            average.update_parameters(model)
        else:
            with torch.no_grad():
                for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(parameter, 0.3)
        average.eval()
        with torch.no_grad():
            found += [float(loss.detach()), float(loss_of(average))]
    return found


def average_of(model: nn.Module, how: str) -> nn.Module:
    return copy.deepcopy(model) if how == "copied" else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))


def averages(rank: int, world_size: int, how: str, ahead: bool) -> tuple[list[float], float]:
    case = mlp()
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs if ahead else None, loss_fn=case.loss_fn,
                            mode="zero3", precision="fp32")
    made = average_of(model, how)
    found = averaging(model, made, case, case.call)
    apart = max(float((whole(a).detach() - whole(b).detach()).abs().max())
                for a, b in zip(made.parameters(), model.parameters(), strict=True))
    return found, apart


@pytest.mark.parametrize(("how", "ahead"), [("copied", True), ("averaged", True), ("copied", False)])
def test_averages_beside_a_model(pool: Any, how: str, ahead: bool) -> None:
    case = mlp()
    plain = average_of(case.model, how)

    def loss_of(model: nn.Module) -> Tensor:
        return Case(model, case.inputs, case.loss_fn).plain_loss(model)

    wanted = averaging(case.model, plain, case, loss_of)
    for found, apart in pool(2).run(averages, how, ahead):
        assert found == pytest.approx(wanted, abs=TOLERANCE) and apart > 1e-4


def pickled(rank: int, world_size: int) -> list[str]:
    said = []
    for inputs in (mlp().inputs, None):
        case = mlp()
        model = autopar.compile(case.model, quick(world_size), inputs=inputs, loss_fn=case.loss_fn, precision="fp32")
        with pytest.raises(autopar.AutoparError) as refusal:
            pickle.dumps(model)
        said.append(str(refusal.value))
    return said


def test_pickling_is_refused_with_what_to_do(pool: Any) -> None:
    for said in pool(2).run(pickled):
        assert all("full_state_dict()" in text and "save_checkpoint" in text for text in said)
