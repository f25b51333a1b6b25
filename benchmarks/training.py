"""Train models by name for some steps on the GPUs at hand: the loss falls, and how long and how large a step is.

    torchrun --standalone --nproc-per-node 4 benchmarks/training.py gpt2:128x1024 resnet50:1024 --out curves.json
    torchrun --standalone --nproc-per-node 1 benchmarks/training.py gpt2:128x1024 --against curves.json

Text is what Python's standard library is written in, byte by byte; images are noisy pictures of their class. Models
start from their own initialisation, drawn per parameter, so that any number of GPUs starts alike. A row that fails is
printed as such. `--against` prints how far a loss curve is from the one of an earlier run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autopar
from autopar.models.catalog import CLASSES, IMAGE_SIZE, MODELS
from autopar.models.registry import build
from autopar.models.resnet import resnet

GIB = 2.0**30
WARMUP = 5
"""Steps whose time does not count: they compile and allocate."""
MASKED, MASK = 0.15, 103
"""The share of tokens that BERT has to guess, and the token in their place."""


@dataclass(frozen=True)
class Row:
    """One model's run: global batch, tokens a sample (None: images), and what was seen."""

    model: str
    batch: int
    seq: int | None
    ranks: int
    mesh: tuple[int, ...]
    milliseconds: float
    mfu: float
    peak_gib: float
    predicted_milliseconds: float
    predicted_gib: float
    start_gib: float
    start_seconds: float
    losses: list[float]

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.seq}" if self.seq else str(self.batch)
        return (f"{self.model} {shape} on {self.ranks}, mesh {'x'.join(map(str, self.mesh))}: "
                f"{self.milliseconds:.1f} ms, {1e3 * self.batch / self.milliseconds:.1f} samples/s, "
                f"MFU {self.mfu:.3f}, peak {self.peak_gib:.1f} GiB; predicted {self.predicted_milliseconds:.1f} ms, "
                f"{self.predicted_gib:.1f} GiB; made in {self.start_seconds:.0f} s within {self.start_gib:.1f} GiB; "
                f"loss {self.losses[0]:.3f} to {statistics.mean(self.losses[-3:]):.3f}")


def text() -> Tensor:
    """The sources of Python's standard library as bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts and "test" not in p.parts]
    return torch.frombuffer(bytearray(b"\n".join(p.read_bytes() for p in paths)), dtype=torch.uint8)


def batches(model: str, batch: int, seq: int | None, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Global batches by keyword, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    source = text() if seq else torch.randn(CLASSES, 3, 8, 8, generator=generator)
    while True:
        if seq is None:
            labels = torch.randint(CLASSES, (batch,), generator=generator)
            noise = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
            pictures = nn.functional.interpolate(source[labels], size=IMAGE_SIZE) + noise
            yield {"pixel_values": pictures.to(device), "labels": labels.to(device)}
            continue
        starts = torch.randint(len(source) - seq, (batch,), generator=generator)
        ids = torch.stack([source[s:s + seq] for s in starts.tolist()]).long()
        hidden = torch.rand(ids.shape, generator=generator) < MASKED
        masked = MODELS[model].family == "bert"
        labels = ids.masked_fill(~hidden, -100) if masked else ids
        yield {"input_ids": (ids.masked_fill(hidden, MASK) if masked else ids).to(device), "labels": labels.to(device)}


def plain(name: str, known: nn.Module, dropout: float | None) -> nn.Module:
    """The model, whose like is `known`, without memory; all its dropout at the rate `dropout` where one is given."""
    with autopar.empty():
        if MODELS[name].family == "resnet":
            return resnet(name).train()
        config: Any = known.config
        for rate in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "dropout", "hidden_dropout_prob",
                     "attention_probs_dropout_prob"):
            if dropout is not None and hasattr(config, rate):
                setattr(config, rate, dropout)
        config.use_cache = False
        made: nn.Module = type(known)(config)
    made.loss_type = known.loss_type  # type: ignore[assignment]
    return made.train()


def train(model: str, batch: int, seq: int | None, arguments: argparse.Namespace) -> Row:
    """A run of one model. Raises whatever goes wrong."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    built = build(model, batch, seq)
    torch.manual_seed(0)
    made: Any = autopar.compile(plain(model, built.model, arguments.dropout), inputs=built.inputs,
                                loss_fn=built.loss_fn, mode=arguments.mode, batch="global",
                                init="model", compiler=arguments.compiler)
    start_seconds, start_gib = time.perf_counter() - begin, torch.cuda.max_memory_allocated() / GIB
    optimizer = torch.optim.AdamW(made.parameters(), lr=arguments.lr, fused=True)
    losses, took = [], []
    for step, given in zip(range(arguments.steps), batches(model, batch, seq, device), strict=False):
        if step == WARMUP:
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        output = made(*given.values()) if built.loss_fn else made(**given)
        loss = output if isinstance(output, Tensor) else output.loss
        loss.backward()
        made.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    step_s, plan = statistics.median(took[WARMUP:]), made.plan
    return Row(model, batch, seq, dist.get_world_size(), tuple(plan.mesh), 1e3 * step_s,
               plan.mfu * plan.step_time_s / step_s, torch.cuda.max_memory_allocated() / GIB, 1e3 * plan.step_time_s,
               plan.memory_bytes["peak"] / GIB, start_gib, start_seconds, losses)


def compared(row: Row, earlier: list[dict[str, Any]]) -> str:
    """How far a curve is from that of the same model in an earlier run."""
    for other in earlier:
        if (other["model"], other["batch"], other["seq"]) == (row.model, row.batch, row.seq):
            apart = max(abs(a - b) for a, b in zip(row.losses, other["losses"], strict=False))
            return f"{row.model}: loss at most {apart:.4f} from the run on {other['ranks']}"
    return f"{row.model}: not in the earlier run"


def read(asked: str) -> tuple[str, int, int | None]:
    """`gpt2:128x1024` or `resnet50:1024`."""
    name, _, shape = asked.partition(":")
    batch, _, seq = shape.partition("x")
    return name, int(batch), int(seq) if seq else None


def main() -> None:
    """Train one model after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=read, help="name:batch or name:batchxtokens, of the global batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--dropout", type=float, help="in place of the model's own")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    autopar.init()
    rows = []
    for model, batch, seq in arguments.models:
        try:
            rows.append(train(model, batch, seq, arguments))
            said = str(rows[-1])
            if arguments.against:
                said += "\n" + compared(rows[-1], json.loads(arguments.against.read_text()))
        except Exception as error:
            said = f"{model} {batch}x{seq}: FAILED {type(error).__name__}: {str(error)[:300]}"
        if dist.get_rank() == 0:
            print(said, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        if arguments.out and dist.get_rank() == 0:
            arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
