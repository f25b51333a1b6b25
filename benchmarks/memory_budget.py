"""Time against memory: a model trained within budgets, from the least that can be to as much as it likes.

    python benchmarks/memory_budget.py --model gpt2-medium --budgets 10 --json --out curve.json --plot curve.png
    torchrun --standalone --nproc-per-node 4 benchmarks/memory_budget.py --model llama-8b --budgets 6

Each budget is a line; peaks are the allocator's, times medians. Beside them in the same run: the blocks compiled as
they are, each within `torch.utils.checkpoint`, and under torch's own `activation_memory_budget`. Activations are the
peak of the step without a budget less what there is before a step. On CPUs, where no peak is measured, the bytes are
those predicted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autopar
from autopar.core.errors import AutoparError, Infeasible
from autopar.models.registry import build
from autopar.models.resnet import resnet

MB = 1e6
PLENTY = 1e15
"""A budget that does not bind, in bytes."""
WARMUP = 3
STEPS = 10
SHARES = (0.9, 0.7, 0.5, 0.3, 0.1)
"""The parts of activations that torch's own budget is asked to keep."""


@dataclass(frozen=True)
class Work:
    """A model, samples a device, tokens a sample (None: images), where its blocks are, settings of its config."""

    model: str
    batch: int
    seq: int | None
    blocks: str
    settings: dict[str, Any]


WORK = {
    "resnet50": Work("resnet50", 128, None, "layer1 layer2 layer3 layer4", {}),
    "gpt2-medium": Work("gpt2-medium", 8, 1024, "transformer.h", {"vocab_size": 50304}),
    "gpt2-xl": Work("gpt2-xl", 8, 1024, "transformer.h", {"vocab_size": 50304}),
    "llama-8b": Work("llama-8b", 2, 4096, "model.layers", {"max_position_embeddings": 4096}),
    "gpt2-tiny": Work("gpt2", 2, 32, "transformer.h", {"vocab_size": 96, "n_layer": 3, "n_embd": 32, "n_head": 4}),
}


@dataclass(frozen=True)
class Row:
    """One step: the budget (None: none), the peak and what of it is no activation, in bytes; seconds. Budgets hold what
    is `around` the peak too: context and communication buffers."""

    name: str
    budget: float | None
    peak: float
    static: float
    seconds: float
    predicted_peak: float | None = None
    predicted_seconds: float | None = None
    around: float = 0.0

    @property
    def activations(self) -> float:
        """Bytes of the peak that are there for the step alone."""
        return self.peak - self.static

    def __str__(self) -> str:
        asked = "none" if self.budget is None else f"{self.budget / MB:.0f} MB"
        told = "" if self.predicted_peak is None or self.predicted_seconds is None else (
            f" (predicted {self.predicted_peak / MB:.0f} MB, {1e3 * self.predicted_seconds:.1f} MS)")
        return (f"{self.name}: memory budget: {asked}, peak memory: {self.peak / MB:.0f} MB, "
                f"step time: {1e3 * self.seconds:.1f} MS{told}")


def plain(work: Work, device: torch.device, dropout: float) -> nn.Module:
    """The model in fp32 with random weights, the same on every rank."""
    torch.manual_seed(0)
    if work.seq is None:
        return resnet(work.model).to(device).train()
    model = build(work.model, 1, work.seq).model
    config: Any = model.config
    config.update({**work.settings, "use_cache": False, **{name: dropout for name in (
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout") if hasattr(config, name)}})
    with device:
        made: nn.Module = type(model)(config)
    return made.train()


def given(work: Work, device: torch.device, ranks: int) -> dict[str, Tensor]:
    """The batch of so many devices."""
    generator = torch.Generator(device).manual_seed(0)
    rows = work.batch * ranks
    if work.seq is None:
        return {"x": torch.randn(rows, 3, 224, 224, device=device, generator=generator),
                "labels": torch.randint(1000, (rows,), device=device, generator=generator)}
    words = work.settings.get("vocab_size", 32000)
    ids = torch.randint(words, (rows, work.seq), device=device, generator=generator)
    return {"input_ids": ids, "labels": ids}


def loss_of(model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    """The loss of a call."""
    if "x" in batch:
        return nn.functional.cross_entropy(model(batch["x"]).float(), batch["labels"])
    loss: Tensor = model(**batch).loss
    return loss


def measured(model: Any, run: Callable[[], Tensor], device: torch.device) -> tuple[float, float, float]:
    """(peak, static bytes, seconds) of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    took, static = [], 0.0
    for step in range(WARMUP + STEPS):
        if device.type == "cuda" and step == WARMUP:
            torch.cuda.reset_peak_memory_stats()
            static = torch.cuda.memory_allocated()
        _settle(device)
        start = time.perf_counter()
        run().backward()
        optimizer.step()
        optimizer.zero_grad()
        _settle(device)
        took.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0.0
    return float(peak), float(static), statistics.median(took[WARMUP:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def ours(work: Work, device: torch.device, dropout: float, budget: float | None) -> Row:
    """A step of autopar's within a budget."""
    batch = given(work, device, dist.get_world_size())
    images = "x" in batch
    made: Any = autopar.compile(
        plain(work, device, dropout), inputs=tuple(batch.values()) if images else batch, batch="global",
        loss_fn=image_loss if images else None, memory_budget=budget or PLENTY)
    plan = made.plan
    peak, static, seconds = measured(made, lambda: made(*batch.values()) if images else made(**batch).loss, device)
    told = plan.memory.total
    return Row("autopar", budget, peak or told, static or plan.memory.parameters + plan.memory.optimizer, seconds, told,
               plan.step_time_s, plan.memory.around or 0.0)


def image_loss(output: Tensor, target: Tensor) -> Tensor:
    """Of a model of images."""
    return nn.functional.cross_entropy(output.float(), target)


class Recomputed(nn.Module):
    """A block that keeps its input alone."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns."""
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


def by_hand(name: str, work: Work, device: torch.device, dropout: float, recompute: bool, share: float | None) -> Row:
    """A step with the blocks compiled one by one, as one would write it."""
    torch._dynamo.reset()
    model = plain(work, device, dropout)
    for path in work.blocks.split():
        blocks = model.get_submodule(path)
        for key, block in list(blocks.named_children()):
            if device.type == "cuda":
                block.compile()
            if recompute:
                setattr(blocks, key, Recomputed(block))
    if hasattr(model, "loss_function") and device.type == "cuda":
        model.loss_function = torch.compile(model.loss_function)  # type: ignore[assignment]
    batch = given(work, device, 1)

    def run() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return loss_of(model, batch)

    with _kept(share):
        peak, static, seconds = measured(model, run, device)
    return Row(name, None, peak, static, seconds)


@contextlib.contextmanager
def _kept(share: float | None) -> Iterator[None]:
    """torch keeps this part of activations in what it compiles inside."""
    if share is None:
        yield
        return
    from torch._functorch import config
    with config.patch(activation_memory_budget=share):
        yield


def hand_rows(work: Work, device: torch.device, dropout: float) -> Iterator[Callable[[], Row]]:
    """The rows of others, on one device."""
    if dist.get_world_size() > 1:
        return
    yield lambda: by_hand("no recompute", work, device, dropout, False, None)
    yield lambda: by_hand("full recompute", work, device, dropout, True, None)
    if device.type == "cuda":
        for share in SHARES:
            yield lambda share=share: by_hand(f"torch budget {share}", work, device, dropout, False, share)


def budgets(work: Work, device: torch.device, dropout: float, count: int) -> tuple[list[float], Row]:
    """`count` budgets from the least feasible to what is used without one, in bytes; and the row without."""
    free = ours(work, device, dropout, None)
    _forget()
    try:
        ours(work, device, dropout, 1.0)
    except Infeasible as refused:
        least = refused.least_budget_bytes
    else:
        raise AssertionError("a byte is enough")
    assert least is not None and free.predicted_peak is not None
    span = free.predicted_peak + free.around - least
    return [least + 1.0 + span * i / max(1, count - 1) for i in range(count)], free


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def claim(rows: list[Row]) -> str:
    """What less memory costs, against the step without a budget."""
    free = next(row for row in rows if row.name == "autopar" and row.budget is None)
    tight = [row for row in rows if row.name == "autopar" and row.budget is not None]
    over = [row for row in tight if row.peak > (row.budget or 0.0)]
    best = "; ".join(f"{100 * (row.activations / (free.activations or 1.0) - 1):+.0f} % activations at "
                     f"{100 * (row.seconds / free.seconds - 1):+.1f} % time" for row in tight)
    return f"{len(over)} of {len(tight)} budgets overshot; {best}"


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Step time against peak memory."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    groups = {"autopar": "o-", "torch budget": "s--", "no recompute": "^", "full recompute": "v"}
    for group, style in groups.items():
        of = sorted((row.peak / MB, 1e3 * row.seconds) for row in rows if row.name.startswith(group))
        if of:
            axes.plot(*zip(*of, strict=True), style, label=group)
    axes.set_xlabel("peak memory, MB")
    axes.set_ylabel("step time, ms")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(WORK), required=True)
    parser.add_argument("--budgets", type=int, default=10)
    parser.add_argument("--batch", type=int, help="samples a device")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args(arguments)


def measure(work: Work, device: torch.device, asked: argparse.Namespace) -> list[Row]:
    """Every row, each printed when it is there."""
    def say(text: object) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    wanted, free = budgets(work, device, asked.dropout, asked.budgets)
    say(free)
    jobs: list[Callable[[], Row]] = [lambda b=b: ours(work, device, asked.dropout, b) for b in reversed(wanted)]
    rows = [free]
    for job in [*jobs, *hand_rows(work, device, asked.dropout)]:
        _forget()
        try:
            rows.append(job())
            say(rows[-1])
        except (AutoparError, RuntimeError, AssertionError) as error:
            say(f"FAILED {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
    say(claim(rows))
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure one model."""
    asked = parsed(arguments)
    work = WORK[asked.model]
    work = replace(work, batch=asked.batch) if asked.batch else work
    autopar.init()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    rows = measure(work, device, asked)
    if dist.get_rank() == 0:
        told = json.dumps([asdict(row) for row in rows], indent=1)
        if asked.json:
            print(told)
        if asked.out:
            asked.out.write_text(told + "\n")
        if asked.plot:
            where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
            plot(rows, asked.plot, f"{asked.model}, {work.batch} samples a device, {where}")
    return rows


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
