"""A plan's own step beside its program as written, on the same state and batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import autopar
from autopar.api import arguments
from autopar.codegen.source.given import inputs, values
from autopar.codegen.source.rank import Rank
from autopar.codegen.source.state import State
from autopar.launch import device
from autopar.passes.capture import capture
from tests.builders import Case, gpt2, mlp, quick, resnet
from tests.families import family

SEED = 7
SMALL = partial(resnet, batch=4, size=32)
CASES: dict[str, Callable[[], Case]] = {
    "gpt2": gpt2, "dropout": partial(gpt2, dropout=0.1), "odd": partial(gpt2, vocab=97), "resnet": SMALL, "mlp": mlp,
}
Figures = tuple[float, float]
"""The loss, and the norm of all gradients together."""


def case_of(name: str) -> Case:
    return CASES[name]() if name in CASES else family(name)


def planned(rank: int, world_size: int, name: str, options: dict[str, Any], folder: str) -> Figures:
    """What the plan's own step comes to; leaves its program, the state and the batch in `folder`."""
    case, cluster = case_of(name), quick(world_size)
    given = case.inputs if isinstance(case.inputs, dict) else {f"args_{i}": x for i, x in enumerate(case.inputs)}
    options = {"precision": "fp32", "solver": "highs", **options}
    if rank == 0:
        tensors = [*case.model.named_parameters(), *case.model.named_buffers()]
        save_file({n: x.detach().clone().contiguous() for n, x in tensors}, f"{folder}/state.safetensors")
        save_file({n: x.clone() for n, x in given.items()}, f"{folder}/inputs.safetensors")
        program = capture(case.model, arguments(case.inputs), options["precision"], case.loss_fn)
    torch.manual_seed(SEED)
    model: Any = autopar.compile(case.model, cluster, inputs=case.inputs, loss_fn=case.loss_fn, **options)
    if rank == 0:
        model.plan.emit(f"{folder}/step.py", program, cluster)
    loss = case.call(model)
    loss.backward()
    return float(loss.detach()), float(model.clip_grad_norm_(1e9))


def written(rank: int, world_size: int, folder: str) -> Figures:
    """What the written program comes to, its functions called by ranks that are there already."""
    dist.barrier()
    spec = importlib.util.spec_from_file_location("step", Path(folder) / "step.py")
    assert spec is not None and spec.loader is not None
    step: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    place = Rank.on(step.MESH, device())
    held = values(f"{folder}/state.safetensors", SEED, step.PARAMETERS, step.BUFFERS)
    state = State.of(place, step.PARAMETERS, step.BUFFERS, held, step.GATHERED)
    batch = inputs(f"{folder}/inputs.safetensors", SEED, step.INPUTS, place)
    loss = step.step(place, state, batch, step.constants(place), place.seeds(SEED, step.SEGMENTS))
    loss.backward()
    return float(loss.detach()), state.gradient_norm()


def both(rank: int, world_size: int, name: str, options: dict[str, Any], folder: str) -> tuple[Figures, Figures]:
    """The plan's own step, then the written program's."""
    return planned(rank, world_size, name, options, folder), written(rank, world_size, folder)
