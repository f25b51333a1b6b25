"""Batches of other sizes than planned: filled up with samples that count for nothing, or planned for anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from tests.builders import CASES, Case, quick
from tests.families import family
from tests.test_exactness import gradient_errors

TOLERANCE = 1e-5


def errors(case: Case, reference: nn.Module, model: nn.Module, rows: slice, mine: slice) -> float:
    """The worst of a step's loss and gradient errors on `rows` of the batch, of which this rank brings `mine`."""
    def cut(part: slice) -> Any:
        inputs = case.inputs
        return {n: x[part] for n, x in inputs.items()} if isinstance(inputs, dict) else tuple(x[part] for x in inputs)
    expected = Case(reference, cut(rows), case.loss_fn).plain_loss(reference)
    expected.backward()
    loss = case.call(model, cut(mine))
    loss.backward()
    found = max(abs(float(loss.detach()) - float(expected.detach())), *gradient_errors(model, reference).values())
    reference.zero_grad()
    model.zero_grad()
    return found


def compiled(name: str, mode: str, world_size: int, samples: int = 8,
             **options: Any) -> tuple[Case, nn.Module, nn.Module]:
    case = CASES[name](batch=samples) if name in CASES else family(name)
    reference = copy.deepcopy(case.model)
    model = autopar.compile(case.model, quick(world_size), loss_fn=case.loss_fn, mode=mode, precision="fp32",
                            **{"inputs": case.inputs, **options})
    return case, reference, model


def shorter(rank: int, world_size: int, name: str, mode: str) -> list[float]:
    """Errors of full batches and smaller ones by turns, whole on every rank or in parts, even and uneven."""
    case, reference, model = compiled(name, mode, world_size)
    everything = slice(0, 8)
    found = [errors(case, reference, model, rows, rows) for rows in (everything, slice(0, 5), slice(2, 3), everything)]
    case, reference, model = compiled(name, mode, world_size)
    part = 8 // world_size
    start = part * rank
    found.append(errors(case, reference, model, everything, slice(start, start + part)))
    ends = [min(8, part * r + (1 if r else part)) for r in range(world_size)]  # one sample on all but the first
    rows = [i for r in range(world_size) for i in range(part * r, ends[r])]
    found.append(errors(case, reference, model, rows, slice(start, ends[rank])))  # type: ignore[arg-type]
    return found


@pytest.mark.dist
@pytest.mark.parametrize(("name", "mode", "world_size"), [
    ("gpt2", "ddp", 4), ("gpt2", "zero3", 2), ("t5", "1d", 2), ("vit", "auto", 2), ("mlp", "zero2", 4)])
def test_smaller_batches_are_filled_up(pool: Any, name: str, mode: str, world_size: int) -> None:
    for found in pool(world_size).run(shorter, name, mode):
        assert max(found) <= TOLERANCE, found


def undividing(rank: int, world_size: int, mode: str) -> tuple[float, tuple[int, ...], int]:
    """The error of a model compiled for six samples on four ranks; the mesh and samples of its plan."""
    case, reference, model = compiled("gpt2", mode, world_size, samples=6)
    plan: Any = model.plan
    first = errors(case, reference, model, slice(0, 6), slice(0, 6))
    case, reference, model = compiled("gpt2", "auto", world_size, samples=6, plan=plan)  # which is for as many, or more
    return max(first, errors(case, reference, model, slice(0, 6), slice(0, 6))), plan.mesh, plan.workload.samples


@pytest.mark.dist
@pytest.mark.parametrize(("mode", "samples"), [("ddp", 8), ("1d", 6), ("zero3", 8)])
def test_a_batch_that_does_not_divide_is_planned_for(pool: Any, mode: str, samples: int) -> None:
    for error, _, planned in pool(4).run(undividing, mode):
        assert error <= TOLERANCE and planned == samples


def other_shapes(rank: int, world_size: int, mode: str, lazy: bool) -> list[float]:
    """Errors of batches that are longer, larger and shorter than the first, and of mixing batches that are smaller."""
    case, reference, model = compiled("gpt2", mode, world_size, **({"inputs": None} if lazy else {}))
    found = [errors(case, reference, model, slice(0, 8), slice(0, 8))]
    for rows, length in ((8, 24), (12, 16), (8, 5), (6, 24), (8, 16)):
        wide = torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(rows * length))
        other = Case(case.model, {"input_ids": wide, "labels": wide})
        found.append(errors(other, reference, model, slice(0, rows), slice(0, rows)))
    if mode == "ddp":
        mixing, reference, model = compiled("resnet", mode, world_size)
        errors(mixing, reference, model, slice(0, 8), slice(0, 8))
        found.append(errors(mixing, reference, model, slice(0, 5), slice(0, 5)))
    return found


@pytest.mark.dist
@pytest.mark.parametrize(("mode", "lazy"), [("ddp", False), ("zero3", True), ("1d", False)])
def test_other_shapes_are_planned_for(pool: Any, mode: str, lazy: bool) -> None:
    for found in pool(2).run(other_shapes, mode, lazy):
        assert max(found) <= TOLERANCE, found


def parts_by_word(rank: int, world_size: int) -> list[float]:
    """Errors where each rank brings as many samples of its own as the plan's whole batch has, and again as many."""
    case, reference, model = compiled("gpt2", "1d", world_size, 16, inputs=CASES["gpt2"]().inputs, batch="local")
    mine = slice(8 * rank, 8 * rank + 8)
    return [errors(case, reference, model, slice(0, 16), mine) for _ in range(2)]


@pytest.mark.dist
def test_local_parts_may_be_as_large_as_the_planned_batch(pool: Any) -> None:
    for found in pool(2).run(parts_by_word):
        assert max(found) <= TOLERANCE, found


def uneven(rank: int, world_size: int) -> str:
    """What is said where ranks bring different numbers of samples that mix."""
    case, _, model = compiled("resnet", "ddp", world_size)
    case.call(model, case.part(rank, world_size))
    try:
        case.call(model, tuple(x[:2 + rank] for x in case.inputs))
    except autopar.AutoparError as error:
        return str(error)
    return "not refused"


@pytest.mark.dist
def test_uneven_parts_of_what_mixes_samples_are_refused(pool: Any) -> None:
    for said in pool(2).run(uneven):
        assert said.startswith("ranks brought [2, 3] samples") and "bn1 (batch_norm.default) mixes samples" in said
        assert "drop_last=True" in said
