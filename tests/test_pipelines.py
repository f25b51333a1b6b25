"""Pipelines on real ranks: loss, gradients and twenty steps of AdamW are the plain model's in one process."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest

import autopar
from tests.builders import Case, gpt2, mlp, quick
from tests.families import family
from tests.test_exactness import FLOOR, whole
from tests.test_matrix import DRIFT, RATE, TOLERANCE, trained

pytestmark = pytest.mark.dist


@dataclass(frozen=True)
class Way:
    """A model, ranks, and how it is cut."""

    name: str
    ranks: int
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}-{self.ranks}-" + "-".join(f"{k}{v}" for k, v in self.options.items())


def case_of(name: str) -> Case:
    made = {"gpt2": lambda: gpt2(layers=4), "uneven": lambda: gpt2(layers=5), "mlp": mlp}
    return made[name]() if name in made else family(name)


def errors(rank: int, world_size: int, name: str, options: dict[str, Any]) -> tuple[float, float, float, float, int]:
    """Of the loss, of the gradients held here, of the curve, of parameters in learning rates; parameters held here."""
    case = case_of(name)
    plain = copy.deepcopy(case.model)
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn, precision="fp32",
                            solver="highs", **options)
    wanted, found = case.plain_loss(plain), case.call(model)
    assert all(p.grad is None for p in model.parameters())
    wanted.backward(), found.backward()
    expected = {n: p.grad for n, p in plain.named_parameters()}
    largest = max(float(g.abs().max()) for g in expected.values())
    held = {n: whole(p.grad).reshape(expected[n].shape) for n, p in model.named_parameters()}
    gradients = max(float((g - expected[n]).abs().max()) / max(float(expected[n].abs().max()), FLOOR * largest)
                    for n, g in held.items())
    plain.zero_grad(), model.zero_grad()
    curves = trained(case, plain, lambda: case.plain_loss(plain)), trained(case, model, lambda: case.call(model))
    after = dict(plain.named_parameters())
    drift = max(float((whole(p.detach()).reshape(after[n].shape) - after[n].detach()).abs().max())
                for n, p in model.named_parameters())
    return (abs(float(found.detach()) - float(wanted.detach())), gradients,
            max(abs(a - b) for a, b in zip(*curves, strict=True)), drift / RATE, len(held))


WAYS = [
    Way("gpt2", 2, {"mode": "pp", "pp": 2, "micro_batches": 1}),
    Way("gpt2", 2, {"mode": "pp", "pp": 2, "micro_batches": 4}),
    Way("uneven", 4, {"mode": "pp", "pp": 4, "micro_batches": 8}),
    Way("gpt2", 4, {"mode": "pp", "pp": 2, "dp": 2, "micro_batches": 2}),
    Way("gpt2", 4, {"mode": "pp1d", "pp": 2, "tp": 2, "micro_batches": 4}),
    Way("gpt2", 4, {"mode": "pp+zero", "pp": 2, "micro_batches": 4}),
    Way("bert", 4, {"mode": "pp+sequence", "pp": 2, "micro_batches": 2}),
    Way("vit", 4, {"mode": "pp1d", "pp": 2, "tp": 2, "micro_batches": 2}),
    Way("mlp", 2, {"mode": "pp", "pp": 2, "micro_batches": 8}),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_training_is_the_plain_models(pool: Any, way: Way) -> None:
    for loss, gradients, curve, drift, held in pool(way.ranks).run(errors, way.name, way.options):
        assert max(loss, gradients, curve) <= TOLERANCE and drift <= DRIFT
        assert 0 < held < len(list(case_of(way.name).model.parameters()))
