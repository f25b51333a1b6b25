"""Run every mode on the GPUs at hand: exactness in fp32 on tiny models, then seconds and memory of real steps.

    torchrun --standalone --nproc-per-node 4 benchmarks/smoke.py --model gpt2 --batch 32 --seq 1024 --compiler inductor

Prints one line a case; a case that fails is printed as such. Each mode runs beside DistributedDataParallel under
autocast, which is what one writes by hand, with each compiler: all in turns of some steps, so that what slows the
machine down slows all. Times are medians over the turns, precision bf16-mixed, fused AdamW, dropout 0. Memory is what a
side holds and needs by itself.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import autopar
from autopar.models.built import BuiltModel
from autopar.models.registry import build

MODES = ("ddp", "zero3", "1d", "auto")
WARMUP, TURNS, STEPS = 4, 5, 6
LABELS = 1000


def say(text: str) -> None:
    """Print once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def attempt(title: str, run: Callable[[], Any]) -> Any:
    """What a case returns; one that fails is printed, and returns nothing."""
    try:
        return run()
    except Exception as error:
        say(f"{title}: FAILED {type(error).__name__}: {str(error)[:300]}")
        return None


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


def exactness(name: str, options: dict[str, Any], device: torch.device) -> str:
    """One fp32 step of a tiny model against the plain model."""
    from tests.builders import CASES
    case = CASES[name]()
    plain = copy.deepcopy(case.model).to(device)
    inputs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), case.inputs)
    moved = type(case)(case.model, inputs, case.loss_fn)
    expected = moved.plain_loss(plain)
    expected.backward()
    model = autopar.compile(case.model, inputs=inputs, loss_fn=case.loss_fn, precision="fp32", **options)
    loss = moved.call(model)
    loss.backward()
    difference = abs(float(loss.detach()) - float(expected.detach()))
    return f"loss error {difference:.1e}, gradient error {worst_error(model, plain):.1e}"


@dataclass(eq=False)
class Side:
    """One way to run a model: its step, the bytes allocated before it was made and held by it between steps."""

    title: str
    step: Callable[[], None]
    plan: Any
    before: int
    held: int = 0

    def warm_up(self) -> None:
        """The first steps, which compile and make the optimizer's state."""
        for _ in range(WARMUP):
            self.step()
        torch.cuda.synchronize()
        self.held = torch.cuda.memory_allocated() - self.before

    def turn(self) -> tuple[float, float]:
        """Milliseconds a step and peak GiB over some steps, without waiting between them."""
        dist.barrier()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - self.held
        start = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        torch.cuda.synchronize()
        took = (time.perf_counter() - start) / STEPS
        return 1e3 * took, (torch.cuda.max_memory_allocated() - others) / 2**30


def materialized(built: BuiltModel, device: torch.device) -> nn.Module:
    """The model with random weights, the same on all ranks, and without dropout."""
    torch.manual_seed(0)
    model = built.model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def local_batch(built: BuiltModel, device: torch.device) -> Any:
    """This rank's part of a random batch."""
    torch.manual_seed(1 + dist.get_rank())

    def part(whole: torch.Tensor) -> torch.Tensor:
        shape = (whole.shape[0] // dist.get_world_size(), *whole.shape[1:])
        return (torch.randn(shape, device=device, dtype=whole.dtype) if whole.is_floating_point()
                else torch.randint(0, LABELS, shape, device=device, dtype=whole.dtype))

    return torch.utils._pytree.tree_map_only(torch.Tensor, part, built.inputs)


def by_hand(built: BuiltModel, device: torch.device, compiler: str) -> tuple[nn.Module, Callable[[Any], Any]]:
    """DistributedDataParallel, and what makes a loss of a batch."""
    wrapped: Any = DistributedDataParallel(materialized(built, device))
    model = torch.compile(wrapped) if compiler == "inductor" else wrapped

    def loss(batch: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return model(**batch).loss if built.loss_fn is None else built.loss_fn(model(*batch[:-1]), batch[-1])

    return model, loss


def by_autopar(built: BuiltModel, device: torch.device, compiler: str,
               mode: str) -> tuple[nn.Module, Callable[[Any], Any]]:
    """A compiled model, and what makes a loss of a batch."""
    model = autopar.compile(materialized(built, device), inputs=built.inputs, loss_fn=built.loss_fn, mode=mode,
                            batch="local", compiler=compiler)
    return model, lambda batch: model(**batch).loss if built.loss_fn is None else model(*batch)


def side(title: str, make: Callable[[BuiltModel], tuple[nn.Module, Callable[[Any], Any]]], built: BuiltModel,
         device: torch.device) -> Side:
    """A side, warmed up."""
    before = torch.cuda.memory_allocated()
    model, loss = make(built)
    batch = local_batch(built, device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    made = Side(title, step, getattr(model, "plan", None), before)
    made.warm_up()
    return made


def throughput(sides: list[Side], head: str) -> None:
    """Steps of all sides in turns."""
    found: dict[str, list[tuple[float, float]]] = {each.title: [] for each in sides}
    for _ in range(TURNS):
        for each in sides:
            found[each.title].append(each.turn())
    for each in sides:
        times = [milliseconds for milliseconds, _ in found[each.title]]
        say(f"{head} {each.title}: {statistics.median(times):.1f} ms a step ({min(times):.1f} to {max(times):.1f}), "
            f"peak {max(peak for _, peak in found[each.title]):.1f} GiB{_predicted(each.plan)}")


def _predicted(plan: Any) -> str:
    if plan is None:
        return ""
    return (f", mesh {'x'.join(map(str, plan.mesh))} predicted {1e3 * plan.seconds.step:.1f} ms, "
            f"{plan.memory.total / 2**30:.1f} GiB")


def compared(arguments: argparse.Namespace, mode: str, device: torch.device) -> None:
    """One mode and what is written by hand, each with all compilers."""
    def built() -> BuiltModel:
        return build(arguments.model, arguments.batch * dist.get_world_size(), arguments.seq)

    makers: dict[str, Callable[[BuiltModel], Any]] = {}
    for compiler in arguments.compiler:
        makers[f"hand-ddp {compiler}"] = lambda model, c=compiler: by_hand(model, device, c)
        makers[f"{mode} {compiler}"] = lambda model, c=compiler: by_autopar(model, device, c, mode)
    head = f"{arguments.model} {arguments.batch}x{arguments.seq or 'longest'} a GPU"
    made = [attempt(f"{head} {title}", lambda title=title, make=make: side(title, make, built(), device))
            for title, make in makers.items()]
    throughput([each for each in made if each is not None], head)


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--batch", type=int, default=32, help="samples a GPU")
    parser.add_argument("--seq", type=int, help="tokens a sample; the model's longest when omitted")
    parser.add_argument("--modes", nargs="+", default=MODES)
    parser.add_argument("--compiler", nargs="+", choices=["inductor", "eager"], default=["inductor"])
    arguments = parser.parse_args()
    autopar.init()
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", torch.cuda.current_device())
    say(f"{dist.get_world_size()} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, mode, compiler in itertools.product(("gpt2", "resnet"), arguments.modes, arguments.compiler):
        title = f"{name} tiny fp32 {mode} {compiler}"
        options = {"mode": mode, "compiler": compiler}
        said = attempt(title, lambda name=name, options=options: exactness(name, options, device))
        say(f"{title}: {said}")
    for mode in arguments.modes:
        attempt(f"{arguments.model} {mode}", lambda mode=mode: compared(arguments, mode, device))
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
