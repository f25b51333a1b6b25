"""Run every mode on the GPUs at hand: exactness in fp32 on tiny models, then seconds and memory of real steps.

    torchrun --standalone --nproc-per-node 4 benchmarks/smoke.py --model gpt2 --batch 32 --seq 1024

Prints one line a case; a case that fails is printed as such. Times are medians over steps, eager, not
compiled, dropout 0.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import autopar
from autopar.models.registry import build

MODES = ("ddp", "zero3", "1d", "auto")
WARMUP, STEPS = 3, 8


def say(text: str) -> None:
    """Print once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def worst_error(model: nn.Module, reference: nn.Module) -> float:
    """The largest gradient error relative to the largest gradient of its tensor, floored at a thousandth of all."""
    grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    floor = 1e-3 * max(float(g.abs().max()) for g in grads.values())
    errors = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found = parameter.grad.full_tensor().reshape(grads[name].shape)
            errors.append(float((found - grads[name]).abs().max()) / max(float(grads[name].abs().max()), floor))
    return max(errors)


def exactness(name: str, mode: str, device: torch.device) -> str:
    """One fp32 step of a tiny model against the plain model."""
    from tests.builders import CASES
    case = CASES[name]()
    plain = copy.deepcopy(case.model).to(device)
    inputs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), case.inputs)
    moved = type(case)(case.model, inputs, case.loss_fn)
    expected = moved.plain_loss(plain)
    expected.backward()
    model = autopar.compile(case.model, inputs=inputs, loss_fn=case.loss_fn, mode=mode, precision="fp32")
    loss = moved.call(model)
    loss.backward()
    difference = abs(float(loss.detach()) - float(expected.detach()))
    return f"loss error {difference:.1e}, gradient error {worst_error(model, plain):.1e}"


def timed(step: Any) -> tuple[float, float]:
    """Median milliseconds a step and peak GiB."""
    torch.cuda.reset_peak_memory_stats()
    took = []
    for i in range(WARMUP + STEPS):
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if i >= WARMUP:
            took.append(time.perf_counter() - start)
    return 1e3 * statistics.median(took), torch.cuda.max_memory_allocated() / 2**30


def throughput(name: str, mode: str, batch: int, seq: int, device: torch.device) -> str:
    """Steps of a real model with random weights; mode `hand-ddp` is DistributedDataParallel under autocast."""
    world, rank = dist.get_world_size(), dist.get_rank()
    built = build(name, batch * world, seq)
    torch.manual_seed(0)
    model = built.model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(rank)
    tokens = torch.randint(0, 50000, (batch, seq), device=device)
    local = {"input_ids": tokens, "labels": tokens}
    if mode == "hand-ddp":
        made: Any = DistributedDataParallel(model)
    else:
        made = autopar.compile(model, inputs=built.inputs, mode=mode, batch="local")
    optimizer = torch.optim.AdamW(made.parameters(), fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=mode == "hand-ddp"):
            loss = made(**local).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    milliseconds, peak = timed(step)
    said = f"{milliseconds:.1f} ms a step, peak {peak:.1f} GiB"
    if mode == "hand-ddp":
        return said
    plan = made.plan
    return (f"{said}, mesh {'x'.join(map(str, plan.mesh))} predicted {1e3 * plan.seconds.step:.1f} ms, "
            f"{plan.memory.total / 2**30:.1f} GiB")


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--batch", type=int, default=32, help="sequences a GPU")
    parser.add_argument("--seq", type=int, default=1024)
    arguments = parser.parse_args()
    autopar.init()
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", torch.cuda.current_device())
    say(f"{dist.get_world_size()} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in ("gpt2", "resnet"):
        for mode in MODES:
            attempt(f"{name} tiny fp32 {mode}", lambda name=name, mode=mode: exactness(name, mode, device))
    for mode in ("hand-ddp", *MODES):
        attempt(f"{arguments.model} {arguments.batch}x{arguments.seq} a GPU {mode}",
                lambda mode=mode: throughput(arguments.model, mode, arguments.batch, arguments.seq, device))
        torch.cuda.empty_cache()
    dist.destroy_process_group()


def attempt(title: str, run: Any) -> None:
    """Run one case and print what comes of it."""
    try:
        said = run()
    except Exception as error:
        said = f"FAILED {type(error).__name__}: {str(error)[:300]}"
    say(f"{title}: {said}")


if __name__ == "__main__":
    main()
