"""Input that can't be right is refused on every rank before they do anything together, with what is needed instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autopar
from autopar.plan import Plan
from tests.builders import gpt2, mlp, quick

pytestmark = pytest.mark.dist


def planned(devices: int, layers: int = 2, batch: int = 8) -> Plan:
    case = gpt2(layers=layers, batch=batch)
    found: Plan = autopar.plan(case.model, quick(devices), inputs=case.inputs, precision="fp32")
    return found


def compiled(world_size: int, **options: Any) -> nn.Module:
    case = gpt2()
    found: nn.Module = autopar.compile(case.model, options.pop("cluster", quick(world_size)), precision="fp32",
                                       **{"inputs": case.inputs, **options})
    return found


def vector_loss(world_size: int) -> None:
    case = mlp()
    autopar.compile(case.model, quick(world_size), inputs=case.inputs[:1], precision="fp32")


def lazy_vector_loss(world_size: int) -> None:
    case = mlp()
    autopar.compile(case.model, quick(world_size), precision="fp32")(case.inputs[0])


def on_meta(world_size: int) -> None:
    case = gpt2()
    compiled(world_size)(**{name: x.to("meta") for name, x in case.inputs.items()})


def different_counts(world_size: int) -> None:
    case = gpt2()
    compiled(world_size)(input_ids=case.inputs["input_ids"], labels=case.inputs["labels"][:4])


def longer_on_one(world_size: int) -> None:
    compiled(world_size)(**{name: x[:, dist.get_rank():] for name, x in gpt2().inputs.items()})


def lazily_longer_on_one(world_size: int) -> None:
    compiled(world_size, inputs=None)(**{name: x[:, dist.get_rank():] for name, x in gpt2().inputs.items()})


def second_order(world_size: int) -> None:
    case = gpt2()
    compiled(world_size)(**case.inputs).loss.backward(create_graph=True)


TROUBLES: dict[str, tuple[Any, list[str]]] = {
    "no scalar": (vector_loss, ["(8, 8)", "none is a scalar loss", "loss_fn="]),
    "no scalar, lazily": (lazy_vector_loss, ["(8, 8)", "none is a scalar loss", "loss_fn="]),
    "a loss_fn that makes none": (lambda n: autopar.compile(
        mlp().model, quick(n), inputs=mlp().inputs, loss_fn=lambda output, target: output), ["(8, 8)", "scalar"]),
    "wrong device": (on_meta, ["input input_ids is on meta", "this rank runs on cpu", "pass tensors on cpu"]),
    "gradients of gradients": (second_order, ["create_graph=True", "plain model"]),
    "counts": (different_counts, ["different numbers of samples", "(8, 16)", "(4, 16)"]),
    "shapes that differ": (longer_on_one, ["of different kinds: inputs of shapes [(8, 16), (8, 16)] on rank 0, "
                                           "[(8, 15), (8, 15)] on rank 1; pass the same"]),
    "shapes that differ, lazily": (lazily_longer_on_one, [
        "[(8, 16), (8, 16)] on rank 0, [(8, 15), (8, 15)] on rank 1"]),
    "plan of another model": (lambda n: compiled(n, plan=planned(n, layers=3)),
                              ["the plan is for program", "GPT2LMHeadModel", "this is", "plan again"]),
    "plan of another batch": (lambda n: compiled(n, plan=planned(n, batch=4)), ["the plan is for program", "shapes"]),
    "plan of another cluster": (lambda n: compiled(n, cluster="cpu:2", plan=planned(n)),
                                ["the plan is for mesh", "cpu:2", "plan again"]),
    "plan for another optimizer": (lambda n: compiled(n, plan=planned(n), optimizer="sgd"), [
        "the plan is for optimizer adamw", "asked for is sgd", "optimizer='adamw'"]),
    "plan of more devices": (lambda n: compiled(n, plan=planned(2 * n)), ["mesh", "cpu:4", "cpu:2", "plan again"]),
    "cluster of more devices": (lambda n: compiled(n, cluster=quick(2 * n)), ["4 devices", "2 ranks are running"]),
}


def refused(rank: int, world_size: int) -> dict[str, str]:
    """What each is refused with, and at the end that ranks are still in step."""
    found = {}
    for name, (act, _) in TROUBLES.items():
        try:
            act(world_size)
            found[name] = "not refused"
        except autopar.AutoparError as error:
            found[name] = str(error)
    return {**found, "none": f"{float(compiled(world_size)(**gpt2().inputs).loss.detach()):.4f}"}


def test_refused_alike_on_every_rank(pool: Any) -> None:
    first, second = pool(2).run(refused)
    assert first == second
    for name, (_, words) in TROUBLES.items():
        assert all(word in first[name] for word in words), (name, first[name])
        assert "\n" not in first[name]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_inputs_on_a_gpu_of_a_model_on_the_cpu(pool: Any) -> None:
    """On one rank alone; the others are told."""
    assert all("cuda" in said for said in pool(2).run(on_a_gpu))


def on_a_gpu(rank: int, world_size: int) -> str:
    case = gpt2()
    model = compiled(world_size)
    try:
        model(**{name: x.cuda() if rank else x for name, x in case.inputs.items()})
    except autopar.AutoparError as error:
        return str(error)
    return "not refused"
