"""torch.distributed.checkpoint as torch documents it: between plans and rank counts, to and from the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import AdamW, Optimizer

import autopar
from tests.builders import CASES, Case, quick
from tests.pool import Pool

pytestmark = pytest.mark.dist
Pools = Callable[[int], Pool]
STEPS = 3
TOLERANCE = 1e-5
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Way:
    """A plan and a rank count; at the first call where `ahead` is False."""

    mode: str
    ranks: int
    mesh: tuple[int, ...] | None = None
    ahead: bool = True

    def __str__(self) -> str:
        return f"{self.mode}-on-{self.ranks}"

    def build(self, seed: int) -> tuple[Case, Any, Optimizer]:
        case = CASES["gpt2"]()
        torch.manual_seed(seed)
        for parameter in case.model.parameters():
            nn.init.normal_(parameter, 0.0, 0.1)
        model = autopar.compile(case.model, quick(self.ranks), inputs=case.inputs if self.ahead else None,
                                precision="fp32", mode=self.mode, mesh=self.mesh)
        return case, model, AdamW(model.parameters(), lr=3e-3)


def train(case: Case, model: Any, optimizer: Optimizer) -> list[float]:
    losses = []
    for _ in range(STEPS):
        loss = case.call(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def state(model: Any, optimizer: Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def first_part(rank: int, world_size: int, way: Way, folder: str) -> list[float]:
    case, model, optimizer = way.build(1)
    train(case, model, optimizer)
    dcp.save(state(model, optimizer), checkpoint_id=folder)
    return train(case, model, optimizer)


def second_part(rank: int, world_size: int, way: Way, folder: str) -> list[float]:
    case, model, optimizer = way.build(2)
    found = state(model, optimizer)
    dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(model, found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"])
    return train(case, model, optimizer)


@pytest.mark.parametrize(("before", "after"), [
    (Way("auto", 4, (2, 2)), Way("zero3", 2)), (Way("zero3", 2, ahead=False), Way("1d", 4)),
    (Way("1d", 2), Way("ddp", 1)), (Way("pp", 2), Way("zero3", 2)), (Way("zero3", 2), Way("pp", 2)),
    pytest.param(Way("pp", 4), Way("pp", 2), marks=pytest.mark.slow),
], ids=str)
def test_a_run_goes_on_under_another_plan(pool: Pools, tmp_path: Any, before: Way, after: Way) -> None:
    wanted = pool(before.ranks).run(first_part, before, str(tmp_path))[0]
    for found in pool(after.ranks).run(second_part, after, str(tmp_path)):
        assert found == pytest.approx(wanted, abs=TOLERANCE)


def to_plain_and_back(rank: int, world_size: int, name: str, mode: str) -> float:
    """What was trained goes into the plain model whole, and what the plain model has comes back."""
    case = CASES[name]()
    plain = copy.deepcopy(case.model)
    start = {n: t.clone() for n, t in plain.state_dict().items()}
    model: Any = autopar.compile(case.model, quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn,
                                 precision="fp32", mode=mode)
    train(case, model, AdamW(model.parameters(), lr=3e-3))
    trained, torchs = model.full_state_dict(), get_model_state_dict(model, options=WHOLE)
    assert set(torchs) == set(trained) and (rank == 0 or not trained)
    if rank == 0:
        assert list(trained) == list(start) and all(type(t) is Tensor for t in trained.values())
        assert all(torch.equal(torchs[n], t) for n, t in trained.items())
        plain.load_state_dict(trained)
    difference = float((case.call(model) - case.plain_loss(plain)).detach().abs()) if rank == 0 else float(
        0 * case.call(model).detach())
    model.load_state_dict(start)
    back = model.full_state_dict()
    assert all(torch.equal(t, start[n]) for n, t in back.items())
    set_model_state_dict(model, trained_on_all(torchs))
    assert all(torch.equal(t, torchs[n]) for n, t in model.full_state_dict().items())
    return difference


def trained_on_all(held: dict[str, Tensor]) -> dict[str, Tensor]:
    found: list[Any] = [held]
    dist.broadcast_object_list(found)
    whole: dict[str, Tensor] = found[0]
    return whole


@pytest.mark.parametrize(("name", "mode"), [("gpt2", "zero3"), ("gpt2", "1d"), ("resnet", "zero3")])
def test_whole_states_go_to_the_plain_model_and_back(pool: Pools, name: str, mode: str) -> None:
    assert pool(2).run(to_plain_and_back, name, mode) == pytest.approx([0.0, 0.0], abs=TOLERANCE)


def by_attribute(rank: int, world_size: int) -> None:
    case = CASES["gpt2"]()
    model: Any = autopar.compile(case.model, quick(world_size), inputs=case.inputs, precision="fp32")
    named = dict(model.named_parameters())
    assert model.transformer.h.__getattr__("0").ln_1.weight is named["transformer.h.0.ln_1.weight"]
    assert model.lm_head.weight is named["transformer.wte.weight"]
    for wrong in (lambda: model.head, lambda: model.transformer.wte.bias, lambda: model.transformer.forward):
        with pytest.raises(AttributeError, match=r"no 'head'|no 'transformer\."):
            wrong()
    assert not hasattr(model, "config") and model.to("cpu") is model


def test_tensors_by_attribute(pool: Pools) -> None:
    pool(2).run(by_attribute)
