"""Pipelines on real ranks: loss, gradients and twenty steps of AdamW are the plain model's in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch

import autopar
from autopar import pipelines
from autopar.codegen.tape import Sums
from autopar.core.schedules import Schedule
from tests.builders import Case, gpt2, mlp, quick, resnet
from tests.families import as_written, family
from tests.test_exactness import FLOOR, whole
from tests.test_matrix import DRIFT, RATE, TOLERANCE, trained
from tests.test_scaler import SCALE, compiled, scaled_step
from tests.test_scaler import TOLERANCE as HALF

pytestmark = pytest.mark.dist


@dataclass(frozen=True)
class Way:
    """A model, ranks, and how it is cut."""

    name: str
    ranks: int
    options: dict[str, Any]
    schedule: Schedule = "1f1b"

    def __str__(self) -> str:
        return f"{self.name}-{self.ranks}-{self.schedule}-" + "-".join(f"{k}{v}" for k, v in self.options.items())


def case_of(name: str) -> Case:
    made = {"gpt2": lambda: gpt2(layers=4), "uneven": lambda: gpt2(layers=5), "mlp": mlp}
    return made[name]() if name in made else family(name)


def gradients_off(model: torch.nn.Module, plain: torch.nn.Module) -> list[float]:
    """How far off each gradient that is held here is, of the largest of its elements or a part of the largest of all.
    """
    expected = {n: p.grad for n, p in plain.named_parameters()}
    largest = max(float(g.abs().max()) for g in expected.values())
    held = {n: whole(p.grad).reshape(expected[n].shape) for n, p in model.named_parameters()}
    return [float((g - expected[n]).abs().max()) / max(float(expected[n].abs().max()), FLOOR * largest)
            for n, g in held.items()]


def errors(rank: int, world_size: int, name: str, schedule: Schedule,
           options: dict[str, Any]) -> tuple[float, float, float, float, int]:
    """Of the loss, of the gradients held here, of the curve, of parameters in learning rates; parameters held here."""
    case = case_of(name)
    plain = copy.deepcopy(case.model)
    with mock.patch.object(pipelines, "_schedules", lambda *_: [schedule]):
        model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn,
                                precision="fp32", solver="highs", **options)
    assert model.plan.schedule == schedule
    wanted, found = case.plain_loss(plain), case.call(model)
    assert all(p.grad is None for p in model.parameters())
    wanted.backward(), found.backward()
    gradients = gradients_off(model, plain)
    plain.zero_grad(), model.zero_grad()
    curves = trained(case, plain, lambda: case.plain_loss(plain)), trained(case, model, lambda: case.call(model))
    after = dict(plain.named_parameters())
    drift = max(float((whole(p.detach()).reshape(after[n].shape) - after[n].detach()).abs().max())
                for n, p in model.named_parameters())
    return (abs(float(found.detach()) - float(wanted.detach())), max(gradients),
            max(abs(a - b) for a, b in zip(*curves, strict=True)), drift / RATE, len(gradients))


WAYS = [
    Way("gpt2", 2, {"mode": "pp", "pp": 2, "micro_batches": 1}),
    Way("gpt2", 2, {"mode": "pp", "pp": 2, "micro_batches": 4}, "looped"),
    Way("gpt2", 2, {"mode": "pp", "pp": 2, "micro_batches": 8}, "interleaved"),
    Way("uneven", 4, {"mode": "pp", "pp": 4, "micro_batches": 8}),
    Way("gpt2", 4, {"mode": "pp", "pp": 2, "dp": 2, "micro_batches": 2}),
    Way("gpt2", 4, {"mode": "pp1d", "pp": 2, "tp": 2, "micro_batches": 4}),
    Way("gpt2", 4, {"mode": "pp+zero", "pp": 2, "micro_batches": 4}),
    Way("bert", 4, {"mode": "pp+sequence", "pp": 2, "micro_batches": 2}),
    Way("vit", 4, {"mode": "pp1d", "pp": 2, "tp": 2, "micro_batches": 2}),
    Way("gpt2", 2, {"mode": "pp", "pp": 2, "micro_batches": 4, "memory_budget": 712e3}),  # recomputes
    Way("mlp", 2, {"mode": "pp", "pp": 2, "micro_batches": 8}, "gpipe"),
    Way("gpt2", 4, {"mode": "pp1d", "pp": 2, "tp": 2, "micro_batches": 2}, "interleaved"),
    Way("llama", 2, {"mode": "pp", "pp": 2, "micro_batches": 2}, "interleaved"),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_training_is_the_plain_models(pool: Any, way: Way) -> None:
    for loss, gradients, curve, drift, held in pool(way.ranks).run(errors, way.name, way.schedule, way.options):
        assert max(loss, gradients, curve) <= TOLERANCE and drift <= DRIFT
        assert 0 < held < len(list(case_of(way.name).model.parameters()))


def normalised(rank: int, world_size: int, options: dict[str, Any], parts: int) -> list[float]:
    """How far from those of one process that adds up gradients of micro-batches are losses, gradients and buffers, in
    three steps of SGD, and evaluation after them."""
    case = resnet(batch=16)  # of fewer samples a channel has so few values that rounding moves gradients
    plain, (x, y) = copy.deepcopy(case.model), case.inputs
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn, precision="fp32",
                            solver="highs", batch_norm="micro-batch", micro_batches=parts, **options)
    found = []
    for _ in range(3):
        losses = [case.loss_fn(plain(a), b) / parts for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)]
        loss = case.call(model)
        sum(losses).backward(), loss.backward()
        found.append(float((loss - sum(losses)).detach()))
        found += gradients_off(model, plain)
        for each in (plain, model):
            optimizer = torch.optim.SGD(each.parameters(), lr=RATE)
            optimizer.step(), optimizer.zero_grad()
    buffers = dict(plain.named_buffers())
    found += [float((b.float() - buffers[n].float()).abs().max()) for n, b in model.named_buffers()]
    with torch.no_grad():
        found.append(float(case.call(model.eval())) - float(case.plain_loss(plain.eval())))
    return [max(map(abs, found)), len(dict(model.named_buffers()))]


@pytest.mark.parametrize(("ranks", "options", "parts"), [
    (2, {"mode": "pp"}, 2), (2, {"mode": "pp"}, 4), (4, {"mode": "pp", "pp": 2, "dp": 2}, 2),
    pytest.param(4, {"mode": "pp", "pp": 4}, 4, marks=pytest.mark.slow)], ids=str)
def test_batch_norm_by_micro_batch_is_that_of_one_process(pool: Any, ranks: int, options: dict[str, Any],
                                                          parts: int) -> None:
    found = pool(ranks).run(normalised, options, parts)
    assert max(error for error, _ in found) <= TOLERANCE
    assert sum(held for _, held in found) == len(list(resnet().model.buffers())) * options.get("dp", 1)


DROPPED: dict[str, Any] = {"gpt2": lambda: gpt2(dropout=0.1), "bert": lambda: as_written("bert")}


def with_dropout(rank: int, world_size: int, name: str, options: dict[str, Any], local: bool) -> list[float]:
    """The losses and norms of gradients of some steps with all dropout of a model."""
    case = DROPPED[name]()
    torch.manual_seed(5)
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn, precision="fp32",
                            solver="highs", **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    found, dp = [], options.get("dp", 1)
    pp = world_size // dp
    for _ in range(4):
        part = case.part(rank % dp * pp + rank // dp, world_size)  # samples are in the order of the mesh, dp x pp
        loss = case.call(model, part if local else None)
        loss.backward()
        found += [float(loss.detach()), float(model.clip_grad_norm_(1.0))]
        optimizer.step()
        optimizer.zero_grad()
    return found


@cache
def alone(pool: Any, name: str) -> list[float]:
    """What one rank makes of it."""
    found: list[float] = pool(1).run(with_dropout, name, {"mode": "ddp"}, False)[0]
    return found


@pytest.mark.parametrize(("name", "ranks", "options", "local"), [
    ("gpt2", 2, {"mode": "pp", "micro_batches": 2}, True), ("gpt2", 2, {"mode": "pp", "micro_batches": 4}, False),
    pytest.param("gpt2", 2, {"mode": "pp", "micro_batches": 1}, False, marks=pytest.mark.slow),
    pytest.param("gpt2", 2, {"mode": "pp", "micro_batches": 8}, False, marks=pytest.mark.slow),
    pytest.param("gpt2", 4, {"mode": "pp", "pp": 2, "dp": 2, "micro_batches": 2}, False, marks=pytest.mark.slow),
    ("gpt2", 4, {"mode": "pp", "pp": 2, "dp": 2, "micro_batches": 2}, True),
    ("gpt2", 4, {"mode": "pp1d", "pp": 2, "tp": 2, "micro_batches": 4}, False),
    pytest.param("bert", 2, {"mode": "pp", "micro_batches": 2}, False, marks=pytest.mark.slow),
    ("bert", 4, {"mode": "pp+sequence", "pp": 2, "micro_batches": 2}, False),
], ids=str)
def test_micro_batches_draw_dropout_as_one_rank_does(pool: Any, name: str, ranks: int, options: dict[str, Any],
                                                     local: bool) -> None:
    for found in pool(ranks).run(with_dropout, name, options, local):
        assert found == pytest.approx(alone(pool, name), abs=2e-5)


def beside_training(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, float]:
    """How far from the plain model's are, by name: evaluation, the norm of gradients, sums of two backwards, state."""
    case = gpt2(layers=3)
    plain = copy.deepcopy(case.model)
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, precision="fp32", solver="highs",
                            **options)
    found: dict[str, float] = {}
    with torch.no_grad():
        found["no_grad"] = abs(float(case.call(model)) - float(case.call(plain)))
    found["eval"] = abs(float(case.call(model.eval())) - float(case.call(plain.eval())))
    model.train(), plain.train()
    fewer: Any = {name: x[:5] for name, x in case.inputs.items()}  # of 8, filled up with samples that count for nothing
    found["fewer"] = abs(float(case.call(model, fewer).detach()) - float(case.call(plain, fewer).detach()))
    for each in (model, plain):
        (3.0 * case.call(each)).backward()
        case.call(each).backward()
    norms = model.clip_grad_norm_(0.5), torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    found["norm"] = abs(float(norms[0]) - float(norms[1])) / float(norms[1])
    grads = {n: p.grad for n, p in plain.named_parameters()}
    found["clipped"] = max(float((whole(p.grad).reshape(grads[n].shape) - grads[n]).abs().max())
                           for n, p in model.named_parameters())
    loss = case.call(model)
    loss.backward()
    with pytest.raises(autopar.AutoparError, match="a second time"):
        model._pipeline and torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    state = model.full_state_dict()
    assert state.keys() == (plain.state_dict().keys() if rank == 0 else set())
    found["state"] = max((float((state[n] - p).abs().max()) for n, p in plain.state_dict().items()), default=0.0) \
        if rank == 0 else 0.0
    other = {name: tensor + 1.0 for name, tensor in plain.state_dict().items()}
    model.load_state_dict(other)
    model.load_state_dict(model.state_dict())
    found["loaded"] = max(float((whole(p) - other[n]).abs().max()) for n, p in model.state_dict().items())
    return found


@pytest.mark.parametrize(("ranks", "options"), [(2, {"mode": "pp", "micro_batches": 4}),
                                                (4, {"mode": "pp+zero", "pp": 2, "micro_batches": 2})], ids=str)
def test_all_else_is_the_plain_models(pool: Any, ranks: int, options: dict[str, Any]) -> None:
    for found in pool(ranks).run(beside_training, options):
        assert max(found.values()) <= TOLERANCE, found


def resumed(rank: int, world_size: int, folder: str, options: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """The losses after a checkpoint, of the run itself and of another plan that takes it up; and a refusal."""
    case, curves = gpt2(layers=2), []
    made = autopar.compile(copy.deepcopy(case.model), quick(world_size), inputs=case.inputs, precision="fp32",
                           solver="highs", **options)
    first = torch.optim.AdamW(made.parameters(), lr=RATE)

    def steps(model: Any, optimizer: Any, count: int) -> list[float]:
        found = []
        for _ in range(count):
            loss = case.call(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found

    steps(made, first, 2)
    autopar.save_checkpoint(folder, made, first, step=2)
    curves += steps(made, first, 2)
    taken = autopar.compile(case.model, quick(world_size), inputs=case.inputs, precision="fp32", solver="highs",
                            **other)
    second = torch.optim.AdamW(taken.parameters(), lr=1.0)
    assert autopar.load_checkpoint(folder, taken, second)["step"] == 2
    return [a - b for a, b in zip(curves, steps(taken, second, 2), strict=True)]


@pytest.mark.parametrize(("options", "other"), [({"mode": "pp", "micro_batches": 2}, {"mode": "zero2"}),
                                                ({"mode": "1d"}, {"mode": "pp", "micro_batches": 4})], ids=str)
def test_checkpoints_move_between_pipelines_and_other_plans(pool: Any, tmp_path: Any, options: dict[str, Any],
                                                            other: dict[str, Any]) -> None:
    for found in pool(2).run(resumed, str(tmp_path), options, other):
        assert max(map(abs, found)) <= TOLERANCE


def scaled(rank: int, world_size: int) -> tuple[list[float], list[tuple[float, bool]]]:
    """Losses of some steps with a GradScaler; then the scale, and whether parameters moved, of a step with an infinity
    in a gradient that the last stage makes, and of one without."""
    case = gpt2(layers=4)
    model, optimizer, scaler = compiled(case, world_size, "pp", None, micro_batches=4)

    def step() -> tuple[float, float, bool]:
        return scaled_step(case.call(model), model, optimizer, scaler)

    def spoilt(sums: Sums, finish: Callable[[Sums], dict[str, torch.Tensor]] = Sums.finish) -> dict[str, torch.Tensor]:
        return {name: grad + torch.inf for name, grad in finish(sums).items()}

    losses = [step()[0] for _ in range(4)]
    with mock.patch.object(Sums, "finish", spoilt) if rank == world_size - 1 else nullcontext():
        during = step()[1:]
    return losses, [during, step()[1:]]


def test_an_infinity_in_one_stage_skips_the_step_on_all(pool: Any) -> None:
    case = gpt2(layers=4)
    optimizer, scaler = torch.optim.AdamW(case.model.parameters(), lr=3e-3), torch.amp.GradScaler("cpu",
                                                                                                 init_scale=SCALE)
    wanted = [scaled_step(case.call(case.model), case.model, optimizer, scaler)[0] for _ in range(4)]
    for losses, (spoilt, after) in pool(2).run(scaled):
        assert losses == pytest.approx(wanted, abs=HALF)
        assert (spoilt, after) == ((SCALE / 2, False), (SCALE / 2, True))


def begun_empty(rank: int, world_size: int, options: dict[str, Any]) -> tuple[dict[str, torch.Tensor], float]:
    """The state of a model that began without memory, and its first loss."""
    with autopar.empty():
        case = gpt2(layers=4)
    torch.manual_seed(3)
    model: Any = autopar.compile(case.model, quick(world_size), inputs=case.inputs, precision="fp32", init="model",
                                 solver="highs", **options)
    assert all(p.is_meta for p in case.model.parameters())
    return model.full_state_dict(), float(case.call(model).detach())


def test_stages_begin_empty_as_one_rank_does(pool: Any) -> None:
    wanted, loss = pool(1).run(begun_empty, {"mode": "ddp"})[0]
    (found, first), (none, second) = pool(2).run(begun_empty, {"mode": "pp", "micro_batches": 2})
    assert not none and found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert (first, second) == pytest.approx((loss, loss), abs=TOLERANCE)
