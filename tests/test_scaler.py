"""GradScaler with fp16-mixed: what overflows on one rank skips the step on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import AdamW

import autopar
from tests.builders import CASES, Case, mlp, quick
from tests.pool import Pool

pytestmark = pytest.mark.dist
Pools = Callable[[int], Pool]
SCALE, LARGE = 1024.0, 3e4
TOLERANCE = 2e-3
"""Of losses in fp16 to those in fp32."""


Training = tuple[Any, AdamW, torch.amp.GradScaler]


def compiled(case: Case, ranks: int, mode: str, mesh: tuple[int, ...] | None, **options: Any) -> Training:
    model: Any = autopar.compile(case.model, quick(ranks), inputs=case.inputs, loss_fn=case.loss_fn, mode=mode,
                                 mesh=mesh, precision="fp16-mixed", **options)
    return model, AdamW(model.parameters(), lr=3e-3), torch.amp.GradScaler("cpu", init_scale=SCALE)


def scaled_step(loss: Any, model: Any, optimizer: AdamW, scaler: torch.amp.GradScaler,
                spoil: Callable[[], None] = lambda: None) -> tuple[float, float, bool]:
    """The loss, the scale afterwards, and whether parameters moved."""
    scaler.scale(loss).backward()
    spoil()
    scaler.unscale_(optimizer)
    if hasattr(model, "clip_grad_norm_"):
        model.clip_grad_norm_(0.5)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    before = [local(p).clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    moved = any(not torch.equal(old, local(p)) for old, p in zip(before, model.parameters(), strict=True))
    return float(loss.detach()), scaler.get_scale(), moved


def local(tensor: Any) -> Any:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def curve(rank: int, world_size: int, name: str, mode: str, mesh: tuple[int, ...] | None) -> list[float]:
    case = CASES[name]()
    model, optimizer, scaler = compiled(case, world_size, mode, mesh)
    return [scaled_step(case.call(model), model, optimizer, scaler)[0] for _ in range(4)]


WAYS = [("mlp", "zero3", (2,)), ("mlp", "1d", (2,)),
        *(pytest.param("gpt2", mode, mesh, marks=pytest.mark.slow)
          for mode, mesh in (("zero3", (2,)), ("1d", (2,)), ("auto", (2, 2))))]


@pytest.mark.parametrize(("name", "mode", "mesh"), WAYS)
def test_curve_is_the_plain_models(pool: Pools, name: str, mode: str, mesh: tuple[int, ...]) -> None:
    case = CASES[name]()
    optimizer, scaler = AdamW(case.model.parameters(), lr=3e-3), torch.amp.GradScaler("cpu", init_scale=SCALE)
    wanted = [scaled_step(case.plain_loss(case.model), case.model, optimizer, scaler)[0] for _ in range(4)]
    for found in pool(torch.Size(mesh).numel()).run(curve, name, mode, mesh):
        assert found == pytest.approx(wanted, abs=TOLERANCE)


def spoiled(rank: int, world_size: int, name: str, mode: str, mesh: tuple[int, ...]) -> list[tuple[float, bool]]:
    """An infinity in the part of a gradient that the last rank alone holds, of one parameter of each layout."""
    case = CASES[name]()
    model, optimizer, scaler = compiled(case, world_size, mode, mesh)
    layouts = {(p.device_mesh, p.placements): p for p in model.parameters()
               if all(isinstance(placement, Shard) for placement in p.placements)}
    assert layouts
    found = []
    for chosen in layouts.values():
        def spoil(chosen: Any = chosen) -> None:
            if rank == world_size - 1:
                chosen.grad.to_local().view(-1)[0] = float("inf")
        found += [scaled_step(case.call(model), model, optimizer, scaler, spoil)[1:],
                  scaled_step(case.call(model), model, optimizer, scaler)[1:]]
    return found


@pytest.mark.parametrize(("name", "mode", "mesh"), WAYS)
def test_an_infinity_on_one_rank_skips_the_step_on_all(pool: Pools, name: str, mode: str,
                                                       mesh: tuple[int, ...]) -> None:
    for found in pool(torch.Size(mesh).numel()).run(spoiled, name, mode, mesh):
        scale = SCALE
        for (after, moved), (later, moves) in zip(found[::2], found[1::2], strict=True):
            scale /= 2
            assert (after, moved) == (scale, False) and (later, moves) == (scale, True)


def overflowing(rank: int, world_size: int, mode: str) -> list[tuple[float, bool]]:
    """A batch of which only the last rank's part overflows, then an ordinary one."""
    case = mlp()
    model, optimizer, scaler = compiled(case, world_size, mode, None)
    x, y = case.inputs
    large = x.clone()
    large[-1] *= LARGE
    return [scaled_step(model(inputs, y), model, optimizer, scaler)[1:] for inputs in (large, x)]


@pytest.mark.parametrize("mode", ["ddp", "zero3", "1d"])
def test_a_part_of_the_batch_that_overflows(pool: Pools, mode: str) -> None:
    for found in pool(2).run(overflowing, mode):
        assert found == [(SCALE / 2, False), (SCALE / 2, True)]
