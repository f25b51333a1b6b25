"""Plans predicted and measured: many of them in one launch, a JSON object a line, for benchmarks/errors.py.

    torchrun --standalone --nproc-per-node 4 benchmarks/prediction.py --links shm --out benchmarks/results

Each job is a model, its batch a device and a mode, `gpt2-32x1024:zero2`. The cluster is measured first, or read from
the file of an earlier call. A job whose row is in the file already is left out, so that a call that was cut short goes
on where it was; no job is begun after `--seconds`. A row has what was predicted, every step's seconds with those until
the host was done, bytes at each point of a step, and on GPUs what a profile tells. Plans are kept beside the rows, so
that they can be priced again. A job that fails is a row with its error.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from links import ENVIRONMENTS
from throughput import Work, given, plain, say
from torch import Tensor, nn
from where import spent

import autopar
from autopar.codegen.arrivals import input_specs
from autopar.codegen.compiled import COMPILERS
from autopar.codegen.executable import build, offline
from autopar.codegen.live import Live
from autopar.codegen.lower import Target
from autopar.codegen.step_bytes import by_call, compiled_footprints, eager_footprints, step_bytes
from autopar.core.cluster import Cluster
from autopar.passes.decision import batch_axes
from autopar.plan import Plan
from autopar.planned import Seconds
from autopar.planner import price_lowered, setting_of

WARMUP, FEWEST, MOST, ENOUGH_S = 4, 4, 15, 3.0
"""Steps that don't count; steps that do, as many as last so long."""
KERNELS = 60
FITTING = ("gpt2-32x1024",)
"""Work that costs are fitted to, which counts for no claim."""
LENGTHS = {"vocab_size": 50304}
TINY = {"n_layer": 3, "n_embd": 128, "n_head": 4, "vocab_size": 512}
WORK = {
    "gpt2-32x1024": Work("gpt2", 32, 1024, {}),
    "gpt2-8x1024": Work("gpt2", 8, 1024, {}),
    "gpt2-xl-8x1024": Work("gpt2-xl", 8, 1024, LENGTHS),
    "gpt2-xl/12-8x1024": Work("gpt2-xl", 8, 1024, {**LENGTHS, "n_layer": 12}),
    "gpt2-xl/12-16x1024": Work("gpt2-xl", 16, 1024, {**LENGTHS, "n_layer": 12}),
    "llama-8b-2x4096": Work("llama-8b", 2, 4096, {"max_position_embeddings": 4096}),
    "llama-8b/4-2x4096": Work("llama-8b", 2, 4096, {"max_position_embeddings": 4096, "num_hidden_layers": 4}),
    "llama-8b/4-4x2048": Work("llama-8b", 4, 2048, {"max_position_embeddings": 4096, "num_hidden_layers": 4}),
    "resnet50-64": Work("resnet50", 64, None, {}),
    "resnet50-256": Work("resnet50", 256, None, {}),
    "gpt2-tiny-4x128": Work("gpt2", 4, 128, TINY),
    "gpt2-tiny-1x32": Work("gpt2", 1, 32, TINY),
    "resnet18-1": Work("resnet18", 1, None, {}),
}
JOBS = {
    "cuda": ("gpt2-xl/12-8x1024:auto", "gpt2-xl/12-8x1024:zero2", "gpt2-xl/12-8x1024:ddp", "gpt2-xl/12-8x1024:zero+1d",
             "llama-8b/4-2x4096:auto", "llama-8b/4-2x4096:zero3", "llama-8b/4-2x4096:1d", "gpt2-32x1024:auto",
             "gpt2-32x1024:zero2", "resnet50-256:auto", "resnet50-256:ddp", "gpt2-xl/12-8x1024:1d",
             "llama-8b/4-2x4096:zero2", "gpt2-xl/12-8x1024:zero3", "gpt2-32x1024:1d"),
    "cpu": ("gpt2-tiny-4x128:auto", "gpt2-tiny-4x128:ddp", "gpt2-tiny-4x128:zero3", "gpt2-tiny-4x128:1d",
            "resnet18-1:ddp", "resnet18-1:auto"),
}
"""What is run where no jobs are named, the most telling first."""


@dataclass(frozen=True)
class Running:
    """A compiled model with its optimizer and this rank's batch; a step in three parts."""

    model: Any
    optimizer: torch.optim.Optimizer
    batch: tuple[Tensor, ...] | dict[str, Tensor]

    def forward(self) -> Tensor:
        """The loss."""
        output = self.model(**self.batch) if isinstance(self.batch, dict) else self.model(*self.batch)
        loss: Tensor = output if isinstance(output, Tensor) else output.loss
        return loss

    def update(self) -> None:
        """After the backward."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """All of it."""
        self.forward().backward()
        self.update()


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_groups() -> str:
    """The name of causal attention that repeats keys and values to as many heads as there are queries: attention in
    groups has no rule, and would run whole on every rank."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float | None = None,
               **__: Any) -> tuple[Tensor, None]:
        times = query.shape[1] // key.shape[1]
        if times > 1:
            key, value = (x[:, :, None].expand(-1, -1, times, -1, -1).reshape(query.shape) for x in (key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("in groups", attend)
    AttentionMaskInterface.register("in groups", lambda *_, **__: None)
    return "in groups"


def ready(work: Work, mode: str, arguments: argparse.Namespace, cluster: Cluster, device: torch.device) -> Running:
    """The model of one job, planned and compiled."""
    model, batch = plain(work, device), given(work, device)
    if work.seq is not None:
        model.config._attn_implementation = in_groups()
        batch = {name: ids % model.config.vocab_size for name, ids in batch.items()}
    world = dist.get_world_size()
    inputs = {name: torch.empty((value.shape[0] * world, *value.shape[1:]), dtype=value.dtype, device="meta")
              for name, value in batch.items()}
    call = {"inputs": tuple(inputs.values()), "loss_fn": nn.functional.cross_entropy} if work.seq is None else {
        "inputs": inputs}
    made = autopar.compile(model, cluster, batch="local", mode=mode, compiler=arguments.compiler,
                           precision=arguments.precision, costs=arguments.costs, **call)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4, fused=True)
    return Running(made, optimizer, tuple(batch.values()) if work.seq is None else batch)


def timed(running: Running, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of each step, of the slowest rank, and those until its host was done; all ranks begin together."""
    took: list[list[float]] = []
    wanted = MOST
    while len(took) < wanted:
        dist.barrier()
        finish(device)
        start = time.perf_counter()
        running.step()
        host = time.perf_counter() - start
        finish(device)
        slowest = torch.tensor([time.perf_counter() - start, host], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        took.append(slowest.tolist())
        wanted = max(FEWEST, min(MOST, round(ENOUGH_S / took[0][0])))
    return [step for step, _ in took], [host for _, host in took]


def points(running: Running, device: torch.device) -> dict[str, Any]:
    """Bytes of this rank's device before a step and after each of its parts, and the most in each part."""
    live = Live("cpu") if device.type == "cpu" else None
    found: dict[str, Any] = {}
    held: list[Tensor] = []

    def note(name: str) -> None:
        finish(device)
        if live is not None:
            live.restart() if name == "before" else None
            found[name], found[f"{name} peak"] = live.bytes, live.peak
            live.restart()
        else:
            found[name], found[f"{name} peak"] = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def parts() -> None:
        note("before")
        held.append(running.forward())
        note("forward")
        held.pop().backward()
        note("backward")
        running.update()
        note("update")

    if live is None:
        torch.cuda.reset_peak_memory_stats()
        parts()
    else:
        states = [value for state in running.optimizer.state.values() for value in state.values()
                  if isinstance(value, Tensor)]
        live.hold([*running.model.parameters(), *states])
        with live:
            parts()
    return found


def measured(running: Running, device: torch.device) -> dict[str, Any]:
    """Everything that is measured of one job, seconds and bytes; bytes of every rank where they may differ.

    The peak on GPUs is that of all steps: what a recorded step works in shows while it is recorded alone.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARMUP):
        running.step()
    steps, hosts = timed(running, device)
    most = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    told = points(running, device)
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, max(most, *(value for name, value in told.items() if name.endswith("peak"))))
    found: dict[str, Any] = {"steps_s": steps, "host_s": statistics.median(hosts), "points": told, "peak_bytes": peaks}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"reserved_bytes": torch.cuda.max_memory_reserved(), "device_bytes": total - free}
        profile = dataclasses.asdict(spent(running.step, ""))
        found["profile_ms"] = {**profile, "longest": profile["longest"][:KERNELS]}
    return found


def row(name: str, arguments: argparse.Namespace, cluster: Cluster, device: torch.device) -> dict[str, Any]:
    """One job from beginning to end. Raises whatever goes wrong."""
    work, _, mode = name.rpartition(":")
    start = time.perf_counter()
    running = ready(WORK[work], mode, arguments, cluster, device)
    plan = running.model.plan
    found = measured(running, device)
    if dist.get_rank() == 0:
        plan.save(arguments.out / f"plan-{arguments.links}-{name.replace('/', '_').replace(':', '-')}.json")
    took = time.perf_counter() - start
    plain = predicted(by_roofline(plan, running, cluster)) if dist.get_rank() == 0 and not plan.stages else None
    return {"mesh": "x".join(map(str, plan.mesh)), "status": plan.status, "measured": found,
            "predicted": predicted(plan), "roofline": plain, "took_s": took}


def predicted(plan: Plan) -> dict[str, Any]:
    """What a plan claims."""
    parts = {part: getattr(plan, f"{part}_s") for part in ("compute", "inline", "exposed", "optimizer")}
    return {"step_s": plan.step_time_s, **parts, "bytes": plan.memory_bytes, "peak_bytes": plan.memory_bytes["peak"],
            "observed": [dataclasses.asdict(each) for each in plan.observed]}


def measured_or_not(name: str, arguments: argparse.Namespace, cluster: Cluster, device: torch.device) -> dict[str, Any]:
    """The row of a job; where segments can't be measured, that is told in it and the roofline's plan is run."""
    try:
        return row(name, arguments, cluster, device)
    except Exception as error:
        if arguments.costs == "roofline":
            raise
        told = f"{type(error).__name__}: {str(error)[:400]}"
        say(f"{name}: costs by the roofline, as this failed: {told}")
        plain = argparse.Namespace(**{**vars(arguments), "costs": "roofline"})
        return {**row(name, plain, cluster, device), "unmeasured": told}


def by_roofline(plan: Plan, running: Running, cluster: Cluster) -> Plan:
    """The same plan as it would be priced if nothing of it had been measured, its bytes by liveness."""
    decision = next(iter(running.model._batches.known.values())).decision
    plain = dataclasses.replace(plan, observed=(), observed_peak=0.0)
    setting = setting_of(plain, cluster)
    priced = price_lowered(decision, setting)[0]
    executable = build(Target(decision, offline(decision.mesh), setting.price, torch.device("meta"),
                              input_specs(decision, batch_axes(decision)), sums="outside"))
    kind = next(running.model.parameters()).device.type
    prints = (compiled_footprints if kind == "cuda" else eager_footprints)(executable, kind)
    peak = step_bytes(executable, by_call(executable, prints), setting.optimizer.state_bytes).peak
    return dataclasses.replace(plain, observed_peak=peak,
                               seconds=Seconds(priced.seconds, priced.compute, priced.inline, priced.exposed,
                                               priced.optimizer))


def known(path: Path) -> set[str]:
    """The jobs whose rows are in the file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {told["job"] for told in map(json.loads, lines) if "measured" in told}


def run(name: str, arguments: argparse.Namespace, cluster: Cluster, device: torch.device, path: Path) -> None:
    """One job, its row written and told."""
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    head = {"job": name, "work": name.rpartition(":")[0], "mode": name.rpartition(":")[2], "links": arguments.links,
            "ranks": dist.get_world_size(), "use": "fit" if name.rpartition(":")[0] in FITTING else "claim",
            "device": where, "torch": torch.__version__, "compiler": arguments.compiler, "command": " ".join(sys.argv)}
    try:
        found = measured_or_not(name, arguments, cluster, device)
        say(f"{name} {arguments.links}, mesh {found['mesh']}: predicted {1e3 * found['predicted']['step_s']:.1f} ms, "
            f"measured {1e3 * statistics.median(found['measured']['steps_s']):.1f} ms, host "
            f"{1e3 * found['measured']['host_s']:.1f}; predicted {found['predicted']['peak_bytes'] / 2**30:.2f} GiB, "
            f"measured {max(found['measured']['peak_bytes']) / 2**30:.2f}; {found['took_s']:.0f} s")
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        say(f"{name}: FAILED {found['error']}")
    if dist.get_rank() == 0:
        with path.open("a") as file:
            file.write(json.dumps({**head, **found}) + "\n")
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def cluster_at(arguments: argparse.Namespace) -> Cluster:
    """The cluster asked for, that of an earlier call, or as it is measured now."""
    path = arguments.out / f"cluster-{arguments.links}.json"
    if arguments.cluster:
        from autopar.arguments import read_cluster
        return read_cluster(arguments.cluster)
    there: list[Any] = [path.exists()]
    dist.broadcast_object_list(there)
    if there[0]:
        return Cluster.load(path)
    found = Cluster.measure(f"{arguments.links} of {dist.get_world_size()}")
    if dist.get_rank() == 0:
        found.save(path)
    dist.barrier()
    return found


def agreed(mine: bool, device: torch.device) -> bool:
    """Rank 0's answer."""
    answer = torch.tensor([mine], device=device)
    dist.broadcast(answer, 0)
    return bool(answer)


def sweep(arguments: argparse.Namespace) -> None:
    """Every job that is not done yet, as long as there is time. Collective."""
    begin = time.perf_counter()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"prediction-{arguments.links}.jsonl"
    cluster = cluster_at(arguments)
    say(f"{dist.get_world_size()} ranks, {arguments.links}, {cluster}, ready after {time.perf_counter() - begin:.0f} s")
    for name in arguments.jobs or JOBS[device.type]:
        if agreed(name in known(path), device):
            continue
        if agreed(time.perf_counter() - begin > arguments.seconds, device):
            say(f"{name}: no time left; the same call again goes on from here")
            break
        run(name, arguments, cluster, device, path)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """What is asked for. Ends the program where a job is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", help="work:mode, such as gpt2-32x1024:zero2; none: a list for the device")
    parser.add_argument("--links", default="nvlink", choices=ENVIRONMENTS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=450.0, help="begin no job after so many")
    parser.add_argument("--cluster", help="a preset or a file, in place of what is measured")
    parser.add_argument("--compiler", choices=COMPILERS)
    parser.add_argument("--costs", choices=("measured", "roofline"), default="measured")
    parser.add_argument("--precision", default="bf16-mixed")
    arguments = parser.parse_args(words)
    for job in arguments.jobs:
        if job.rpartition(":")[0] not in WORK:
            parser.error(f"{job} is not of the form work:mode; work is one of {', '.join(WORK)}")
    return arguments


def main() -> None:
    """Set the links, meet, sweep."""
    arguments = parsed()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.update(ENVIRONMENTS[arguments.links].variables(rank, world))
    autopar.init()
    sweep(arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
