"""Train a small byte-level GPT on the sources of Python's standard library, under the plan that autopar makes.

    torchrun --standalone --nproc-per-node 4 examples/train_gpt2.py --minutes 1
    python examples/train_gpt2.py --steps 100

The same arguments give the same loss curve on any number of ranks and in any mode.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quiet  # noqa: F401
import torch
from budget import INTERRUPTED, Budget, parsed, positive, start
from display import Display
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import autopar

WARMUP_STEPS = 15
HEAD_WIDTH = 32
VALIDATION_BATCHES = 4
HELD_OUT = 20
"""One file in so many is kept for validation."""
SKIPPED = {"site-packages", "test", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class Text:
    """Bytes to learn from and bytes held out."""

    train: Tensor
    validation: Tensor

    @classmethod
    def of_standard_library(cls) -> Text:
        """The sources found on this machine, split by file."""
        root = Path(sysconfig.get_path("stdlib"))
        paths = [p for p in sorted(root.rglob("*.py")) if p.relative_to(root).parts[0] not in SKIPPED]
        parts: tuple[list[bytes], list[bytes]] = [], []
        for path in paths:
            parts[zlib.crc32(path.relative_to(root).as_posix().encode()) % HELD_OUT == 0].append(path.read_bytes())
        if not all(parts):
            raise autopar.AutoparError(f"{root} has {len(paths)} Python sources, needed are some dozens; use a Python "
                                       "that comes with its library's sources")
        train, validation = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
        return cls(train, validation)


@dataclass(frozen=True)
class Batches:
    """Batches by number: the same for a number on any rank, in any run with the same seed."""

    source: Tensor
    size: int
    length: int
    seed: int

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        begins = torch.randint(len(self.source) - self.length, (self.size,), generator=generator)
        ids = torch.stack([self.source[b:b + self.length] for b in begins.tolist()]).long()
        return {"input_ids": ids, "labels": ids}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a small byte-level GPT under the plan that autopar makes.")
    parser.add_argument("--batch", type=positive, default=16, help="sequences a global batch (default: %(default)s)")
    parser.add_argument("--seq", type=positive, default=64, help="bytes a sequence (default: %(default)s)")
    parser.add_argument("--layers", type=positive, default=4, help="transformer blocks (default: %(default)s)")
    parser.add_argument("--width", type=positive, default=128, help="a multiple of 32 (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: %(default)s)")
    return parsed(parser)


def gpt(arguments: argparse.Namespace) -> GPT2LMHeadModel:
    """A plain GPT over bytes; its dropout is off, as a minute's training sees no byte twice."""
    if arguments.width % HEAD_WIDTH:
        raise autopar.AutoparError(f"--width is {arguments.width}, needed is a multiple of {HEAD_WIDTH}")
    torch.manual_seed(arguments.seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=256, n_positions=arguments.seq, n_layer=arguments.layers, n_embd=arguments.width,
        n_head=arguments.width // HEAD_WIDTH, initializer_range=arguments.width**-0.5, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    model.loss_type = "ForCausalLM"  # what transformers falls back to anyway, with a warning
    return model


def learning_rate(highest: float, budget: Budget) -> float:
    """A linear warm-up over some steps, then a cosine down to a tenth over the whole run."""
    cosine = 0.55 + 0.45 * math.cos(math.pi * budget.fraction)
    return highest * min(1.0, (budget.step + 1) / WARMUP_STEPS) * cosine


def validation_loss(model: nn.Module, batches: Batches) -> float:
    """The mean loss on held-out text, by the compiled model in eval mode."""
    model.eval()
    with torch.no_grad():
        losses: list[float] = [model(**batches[number]).loss.item() for number in range(VALIDATION_BATCHES)]
    model.train()
    return sum(losses) / len(losses)


def main() -> int:
    """Train; 0 if the loss fell."""
    arguments = options()
    autopar.init()
    text, plain = Text.of_standard_library(), gpt(arguments)
    shape = arguments.batch, arguments.seq, arguments.seed
    train, held_out = Batches(text.train, *shape), Batches(text.validation, *shape)
    # Every rank passes the whole batch and the plan takes each rank's part of it: the text is small and at hand
    # everywhere, and what a batch holds does not depend on how many ranks there are.
    model: Any = autopar.compile(plain, inputs=train[0], batch="global", mode=arguments.mode, precision="fp32")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    display = Display("tokens", arguments.batch * arguments.seq)
    display.plan(model.plan, model)
    display.say(f"text   {len(text.train) / 1e6:.1f} MB of Python's standard library; other files, "
                f"{len(text.validation) / 1e6:.1f} MB, are held out")
    if arguments.plan_out and torch.distributed.get_rank() == 0:
        model.plan.save(arguments.plan_out)
    budget = Budget(arguments.steps, arguments.minutes)
    if arguments.resume:
        progress = autopar.load_checkpoint(arguments.resume, model, optimizer)
        display.losses += progress["losses"]
        budget.resume(progress["step"], progress["seconds"])
        display.say(f"going on from step {budget.step} in {arguments.resume}")

    def check() -> float:
        found = validation_loss(model, held_out)
        display.say(f"step {budget.step:>5}   validation {found:.3f}")
        if arguments.save:
            autopar.save_checkpoint(arguments.save, model, optimizer, step=budget.step, seconds=budget.seconds,
                                    losses=display.losses)
        return found

    display.begin()
    while not budget.over:
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(arguments.lr, budget)
        loss = model(**train[budget.step]).loss
        loss.backward()
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        budget.advance()
        display.step(budget, loss.item(), time.monotonic() - began)
        if budget.at_mark:
            check()
    fell = display.end(f"validation {check():.2f}", budget.stopped)
    return INTERRUPTED if budget.stopped else int(not fell)


if __name__ == "__main__":
    start(main)
