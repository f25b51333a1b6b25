"""Training by recorded steps beside the plain model's, run by torchrun; rank 0 prints what test_replay reads."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.core.errors import AutoparError
from tests.builders import CASES

STEPS = 10


def batches(inputs: dict[str, Tensor], device: torch.device) -> list[dict[str, Tensor]]:
    """One batch a step."""
    generator = torch.Generator().manual_seed(1)
    order = [torch.randperm(8, generator=generator) for _ in range(STEPS)]
    return [{name: x[each].to(device) for name, x in inputs.items()} for each in order]


def trained(model: nn.Module, given: list[dict[str, Tensor]]) -> list[float]:
    """Losses with gradients of two batches a step, an evaluation between, and gradients that are held for longer."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for k, batch in enumerate(given):
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss))
        if k == 6:
            model.eval()
            losses.append(float(model(**batch).loss))
            model.train()
        if k % 2:
            held = [p.grad for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(sum(_squares(g) for g in held if g is not None)))
    return losses


def _squares(grad: Tensor) -> Tensor:
    return (grad.full_tensor() if isinstance(grad, DTensor) else grad).square().sum()


def refused(model: Any, batch: dict[str, Tensor]) -> str:
    """What a second backward is told; two forwards before a backward, of which one is not replayed, must run."""
    first, second = model(**batch).loss, model(**batch).loss
    first.backward()
    second.backward()
    loss = model(**batch).loss
    with pytest.raises(AutoparError) as error:
        loss.backward(retain_graph=True)
    return str(error.value)


def main() -> None:
    """Each mode of the command line in turn."""
    autopar.init()
    torch.backends.cuda.matmul.allow_tf32 = False
    device, found = torch.device("cuda", torch.cuda.current_device()), []
    case = CASES["gpt2"]()
    given = batches(case.inputs, device)  # type: ignore[arg-type]
    plain = copy.deepcopy(case.model).to(device)
    wanted = trained(plain, given)
    for mode in sys.argv[1:]:
        model: Any = autopar.compile(copy.deepcopy(case.model), inputs=given[0], precision="fp32", mode=mode,
                                     compiler="inductor-graphs")
        losses = trained(model, given)
        parameters = dict(plain.named_parameters())
        moved = max(float(((p.full_tensor() if isinstance(p, DTensor) else p).reshape(-1)
                           - parameters[name].reshape(-1)).abs().max()) for name, p in model.named_parameters())
        found.append({"mode": mode, "moved": moved, "recorded": len(model._replays.made),
                      "losses": max(abs(a - b) / (1.0 + abs(b)) if a == a else 1e9
                                    for a, b in zip(losses, wanted, strict=True)),
                      "refused": refused(model, given[0])})
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()  # while models and their recordings live


if __name__ == "__main__":
    main()
