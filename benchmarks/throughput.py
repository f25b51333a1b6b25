"""autopar against training written by hand: seconds a step of both, step about in one launch, and their ratio.

    torchrun --standalone --nproc-per-node 4 benchmarks/throughput.py gpt2-32x1024 --ways "zero2 cudnn" "ddp flash"

Hugging Face models with random weights, dropout 0, bf16-mixed, fused AdamW. autopar's model stays, the rows by hand
come and go; of each pair ROUNDS times STEPS steps are timed in turn. A row that fails is printed as such. `--links`
makes slower clusters of one box by what NCCL may use. MFU counts (6 N + 6 L h s) FLOP a token, N without embeddings,
over 989 TFLOP/s. Results are added to `--out`, one JSON object a line; rows that are in it already, of the same work
and settings, are left out, so that a call that was cut short goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hand import WAYS, Job, Way
from torch import Tensor, nn

import autopar
from autopar.models.registry import build
from autopar.models.resnet import resnet

ROUNDS, STEPS, WARMUP = 3, 6, 5
PEAK = 989e12
ALONE = "alone"
GIB = 2.0**30
LINKS = {
    "nvlink": {},
    "shm": {"NCCL_P2P_DISABLE": "1"},
    "tcp": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"},
    "two-hosts": {"NCCL_SOCKET_IFNAME": "lo", "NCCL_HOSTID": "{half}"},
    "two-hosts-interleaved": {"NCCL_SOCKET_IFNAME": "lo", "NCCL_HOSTID": "{odd}"},
}


@dataclass(frozen=True)
class Work:
    """A model with this many samples a GPU, `seq` tokens each (None: images), and its config's settings."""

    model: str
    batch: int
    seq: int | None
    settings: dict[str, Any]


WORK = {
    "gpt2-32x1024": Work("gpt2", 32, 1024, {}),
    "gpt2-xl-8x1024": Work("gpt2-xl", 8, 1024, {"vocab_size": 50304}),
    "gpt2-xl-32x1024": Work("gpt2-xl", 32, 1024, {"vocab_size": 50304}),
    "gpt2-1.3b-16x1024": Work("gpt2-xl", 16, 1024, {"vocab_size": 50304, "n_layer": 24, "n_embd": 2048, "n_head": 16}),
    "llama-8b-2x4096": Work("llama-8b", 2, 4096, {"max_position_embeddings": 4096}),
    "resnet50-256": Work("resnet50", 256, None, {}),
}


@dataclass(frozen=True)
class Timed:
    """One side of a comparison."""

    milliseconds: float
    peak_gib: float
    tokens_per_s: float
    mfu: float


@dataclass(frozen=True)
class Mine:
    """autopar's side: a step, the most bytes it had, and the FLOP of a sample."""

    step: Callable[[], None]
    peak: float
    flop: float


def say(text: str) -> None:
    """Print once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def plain(work: Work, device: torch.device) -> nn.Module:
    """The model in fp32 with random weights, the same on every rank."""
    torch.manual_seed(0)
    if work.seq is None:
        return resnet(work.model).to(device).train()
    config = build(work.model, 1, work.seq).model.config
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    config.update({**work.settings, "use_cache": False})
    config._attn_implementation = causal_attention()
    with device:
        model: nn.Module = type(build(work.model, 1, work.seq).model)(config)
    return model.train()


def causal_attention() -> str:
    """The name of causal attention without a mask: transformers makes one where it is compiled, which rules out the
    fast kernels."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float | None = None,
               **__: Any) -> tuple[Tensor, None]:
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                                         enable_gqa=query.shape[1] != key.shape[1])
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("causal", attend)
    AttentionMaskInterface.register("causal", lambda *_, **__: None)
    return "causal"


def given(work: Work, device: torch.device) -> dict[str, Tensor]:
    """This rank's batch."""
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    if work.seq is None:
        pictures = torch.randn(work.batch, 3, 224, 224, device=device, generator=generator)
        return {"x": pictures.contiguous(memory_format=torch.channels_last),
                "labels": torch.randint(1000, (work.batch,), device=device, generator=generator)}
    ids = torch.randint(50000, (work.batch, work.seq), device=device, generator=generator)
    return {"input_ids": ids, "labels": ids}


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules in the longest list of modules; the stages of a ResNet."""
    if hasattr(model, "layer4"):
        return ("layer1", "layer2", "layer3", "layer4")
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    longest = max(lists, key=lambda name: len(lists[name]))
    return tuple(f"{longest}.{i}" for i in range(len(lists[longest])))


def loss_of(work: Work) -> Callable[[Callable[..., Any], dict[str, Tensor]], Tensor]:
    """How a plain model gives its loss."""
    if work.seq is None:
        return lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
    return lambda model, batch: model(**batch).loss


def by_hand(work: Work, way: Way, device: torch.device) -> Callable[[], None]:
    """A step of training by hand."""
    model = plain(work, device)
    job = Job(model, blocks_of(model), given(work, device), loss_of(work))
    forward = way.parallel(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with way.around():
            loss = job.loss(forward, job.batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def automatic(work: Work, arguments: argparse.Namespace, device: torch.device) -> tuple[Callable[[], None], Any]:
    """A step of autopar, and its plan."""
    model, batch = plain(work, device), given(work, device)
    world = dist.get_world_size()
    inputs = {name: torch.empty((value.shape[0] * world, *value.shape[1:]), dtype=value.dtype, device="meta")
              for name, value in batch.items()}
    extra: dict[str, Any] = {"cluster": arguments.cluster} if arguments.cluster else {}
    extra |= {name: getattr(arguments, name) for name in ("pp", "micro_batches") if getattr(arguments, name)}
    call = {"inputs": tuple(inputs.values()), "loss_fn": nn.functional.cross_entropy} if work.seq is None else {
        "inputs": inputs}
    made: Any = autopar.compile(model, batch="local", mode=arguments.mode, compiler=arguments.compiler, **call, **extra)
    del model
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        output = made(*batch.values()) if work.seq is None else made(**batch)
        (output if isinstance(output, Tensor) else output.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step, made.plan


def seconds(step: Callable[[], None], times: int) -> list[float]:
    """Seconds of each of so many steps, every rank waiting for the others."""
    took = []
    for _ in range(times):
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return took


def flop_per_sample(work: Work, device: torch.device) -> float:
    """FLOP of a sample, forward and backward; 3 x 8.2e9 for a ResNet-50."""
    if work.seq is None:
        return 3 * 8.2e9
    config = build(work.model, 1, work.seq).model.config
    config.update(work.settings)
    with torch.device("meta"):
        model = type(build(work.model, 1, work.seq).model)(config)
    matmul = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "wte" not in name
                 and "wpe" not in name and "embed" not in name)
    head = model.get_output_embeddings().weight
    matmul += head.numel() if any(head is p for n, p in model.named_parameters() if "wte" in n or "embed" in n) else 0
    layers, width = config.num_hidden_layers, config.hidden_size
    return work.seq * (6.0 * matmul + 6.0 * layers * width * work.seq)


def told(work: Work, took: list[float], peak: float, flop: float) -> Timed:
    """The figures of one side."""
    median = statistics.median(took)
    samples = work.batch * dist.get_world_size() / median
    return Timed(1e3 * median, peak / GIB, samples * (work.seq or 1), samples * flop / dist.get_world_size() / PEAK)


def settings(name: str, way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What makes a row another one."""
    asked = {key: getattr(arguments, key) for key in ("links", "mode", "compiler", "pp", "micro_batches", "measure")}
    return {"work": name, "way": way, "ranks": dist.get_world_size(), "device": torch.cuda.get_device_name(), **asked}


def known(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of earlier calls, as rank 0 sees them."""
    told: list[Any] = [None]
    if dist.get_rank() == 0 and arguments.out and arguments.out.exists():
        told = [[json.loads(line) for line in arguments.out.read_text().splitlines()]]
    dist.broadcast_object_list(told, 0)
    return told[0] or []


def compare(name: str, arguments: argparse.Namespace, device: torch.device) -> None:
    """autopar against each row by hand on one piece of work, as far as that is not known."""
    rows = [row for row in known(arguments) if "failed" not in row]
    ways = [way for way in arguments.ways or [ALONE]
            if not any(settings(name, way, arguments).items() <= row.items() for row in rows)]
    if not ways:
        say(f"{name}: all rows are in {arguments.out}")
        return
    start = time.perf_counter()
    own, plan = automatic(WORK[name], arguments, device)
    torch.cuda.reset_peak_memory_stats()
    seconds(own, WARMUP)
    say(f"{name} on {dist.get_world_size()}, {arguments.links}: autopar {arguments.mode} mesh "
        f"{'x'.join(map(str, plan.mesh))}{_staged(plan)} ready in {time.perf_counter() - start:.0f} s, predicted "
        f"{1e3 * plan.step_time_s:.1f} ms, {plan.memory_bytes['peak'] / GIB:.1f} GiB")
    mine = Mine(own, torch.cuda.max_memory_allocated(), flop_per_sample(WORK[name], device))
    for way in ways:
        try:
            beside(name, way, mine, arguments, device)
        except Exception as error:
            say(f"{name} {way}: FAILED {type(error).__name__}: {str(error)[:200]}")
            keep({**settings(name, way, arguments), "failed": f"{type(error).__name__}: {error}"}, arguments)
        gc.collect()
        torch.cuda.empty_cache()


def beside(name: str, way: str, mine: Mine, arguments: argparse.Namespace, device: torch.device) -> None:
    """One row: both sides in turn, or autopar alone."""
    work = WORK[name]
    if way == ALONE:
        report(name, way, told(work, seconds(mine.step, ROUNDS * STEPS), mine.peak, mine.flop), None, arguments)
        return
    held = torch.cuda.memory_allocated()
    other = by_hand(work, WAYS[way], device)
    torch.cuda.reset_peak_memory_stats()
    seconds(other, WARMUP)
    peak = torch.cuda.max_memory_allocated() - held
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        took[0].extend(seconds(mine.step, STEPS))
        took[1].extend(seconds(other, STEPS))
    report(name, way, told(work, took[0], mine.peak, mine.flop), told(work, took[1], peak, mine.flop), arguments)


def _staged(plan: Any) -> str:
    """The stages of a plan that has some."""
    if not plan.stages:
        return ""
    cut = ", ".join(f"{stage.segments} on {'+'.join(map(str, stage.devices))}" for stage in plan.stages)
    return f", {len(plan.stages)} stages ({cut}), {plan.micro_batches} micro-batches by {plan.schedule},"


def report(name: str, way: str, own: Timed, other: Timed | None, arguments: argparse.Namespace) -> None:
    """Print a row, and keep it."""
    def line(side: Timed) -> str:
        return (f"{side.milliseconds:.1f} ms, {side.tokens_per_s / 1e3:.1f} k/s, MFU {side.mfu:.3f}, "
                f"{side.peak_gib:.1f} GiB")
    ratio = other.milliseconds / own.milliseconds if other else None
    say(f"{name} {way}: autopar {line(own)}" + (f"; {way} {line(other)}; {ratio:.3f}x" if other else ""))
    keep({**settings(name, way, arguments), "ratio": ratio, "torch": torch.__version__, "command": " ".join(sys.argv),
          "autopar": asdict(own), "hand": asdict(other) if other else None}, arguments)


def keep(row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Add a row to the file of results."""
    if arguments.out and dist.get_rank() == 0:
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    """Compare on all work asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", nargs="+", choices=WORK)
    parser.add_argument("--ways", nargs="*", default=["ddp flash", "zero2 flash", "zero2 cudnn", "zero3 flash"],
                        choices=WAYS)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--pp", type=int, help="stages of autopar's plan")
    parser.add_argument("--micro-batches", type=int, help="micro-batches of autopar's plan")
    parser.add_argument("--measure", action="store_true", help="plan for the links as they are measured first")
    parser.add_argument("--cluster", help="a preset or a file, in place of what is found")
    parser.add_argument("--links", default="nvlink", choices=LINKS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for key, value in LINKS[arguments.links].items():
        os.environ[key] = value.format(half=f"host{2 * rank // world}", odd=f"host{rank % 2}")
    autopar.init()
    device = torch.device("cuda", torch.cuda.current_device())
    if arguments.measure:
        arguments.cluster = autopar.Cluster.measure(f"{arguments.links} of {world}")
    say(f"{world} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in arguments.work:
        try:
            compare(name, arguments, device)
        except Exception as error:
            say(f"{name}: FAILED {type(error).__name__}: {str(error)[:400]}")
        gc.collect()
        torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
