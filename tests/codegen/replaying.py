"""Training by recorded steps beside training without, run by torchrun; rank 0 prints what test_replay reads."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.core.errors import AutoparError
from tests.builders import Case, gpt2, resnet

STEPS = 10
CASES: dict[str, Callable[[], Case]] = {"gpt2": gpt2, "dropout": lambda: gpt2(dropout=0.1), "resnet": resnet}


def batches(case: Case, device: torch.device) -> list[Any]:
    """One batch a step."""
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(8, generator=generator) for _ in range(STEPS)]
    if isinstance(case.inputs, dict):
        return [{name: x[order].to(device) for name, x in case.inputs.items()} for order in orders]
    return [tuple(x[order].to(device) for x in case.inputs) for order in orders]


def trained(model: nn.Module, given: list[Any], loss_of: Callable[[nn.Module, Any], Tensor]) -> list[float]:
    """Losses with gradients of two batches a step, an evaluation between, a shorter batch once, gradients that are
    held for longer, and two backwards of one call."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    norms = any("running" in name for name, _ in model.named_buffers())
    for k, batch in enumerate(given):
        loss = loss_of(model, batch)
        if k == 4 and not norms:
            loss.backward(retain_graph=True)
        loss.backward()
        losses.append(float(loss))
        if k == 6:
            model.eval()
            losses.append(float(loss_of(model, batch)))
            model.train()
        if k % 2:
            held = [p.grad for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(sum(_squares(g) for g in held if g is not None)))
    return losses


def _squares(grad: Tensor) -> Tensor:
    return (grad.full_tensor() if isinstance(grad, DTensor) else grad).square().sum()


def refused(model: Any, call: Callable[[], Tensor]) -> list[str]:
    """What is told where a parameter is changed between forward and backward, and, where the forward changes buffers,
    of a second backward; two forwards before a backward, of which one is not replayed, must run."""
    first, second = call(), call()
    first.backward()
    second.backward()
    found = []
    for spoil, keep in ((True, False), (False, True)):
        loss = call()
        if spoil:
            with torch.no_grad():
                next(model.parameters()).mul_(1.0)
        try:
            loss.backward(retain_graph=keep)
            found.append("")
        except AutoparError as error:
            found.append(str(error))
        del loss  # its step is not waited for
    return found


def compared(name: str, mode: str, device: torch.device, **options: Any) -> dict[str, Any]:
    """How far training by recorded steps is from training without: by the plain model, or under dropout by the same
    plan's steps as they are launched op by op. `options` are those of what is recorded."""
    case = CASES[name]()
    given = batches(case, device)

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        if model is plain:
            output = model(**batch) if isinstance(batch, dict) else model(batch[0])
            return case.loss_fn(output, batch[1]) if case.loss_fn else output.loss
        return case.call(model, batch)

    def made(**chosen: Any) -> Any:
        model = autopar.compile(copy.deepcopy(case.model), inputs=given[0], precision="fp32", mode=mode,
                                loss_fn=case.loss_fn, exact_dropout=True, **chosen)
        model.set_random_state({"seed": 5, "steps": 0})
        return model

    plain = copy.deepcopy(case.model).to(device)
    model = made(**options)
    other = plain if name != "dropout" else made(compiler="eager")
    losses, wanted = trained(model, given, loss_of), trained(other, given, loss_of)
    parameters = dict(other.named_parameters())
    moved = max(float((whole(p).reshape(-1) - whole(parameters[n]).reshape(-1)).abs().max())
                for n, p in model.named_parameters())
    return {"name": name, "mode": mode, "moved": moved, "recorded": len(model._replays.made),
            "losses": max(abs(a - b) / (1.0 + abs(b)) if a == a else 1e9 for a, b in zip(losses, wanted, strict=True)),
            "refused": refused(model, lambda: case.call(model, given[0]))}


def whole(tensor: Tensor) -> Tensor:
    """The whole of a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    """Each case and mode of the command line, such as gpt2:ddp, in turn."""
    autopar.init()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda", torch.cuda.current_device())
    found = [compared(*word.split(":"), device) for word in sys.argv[1:]]
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()  # while models and their recordings live


if __name__ == "__main__":
    main()
