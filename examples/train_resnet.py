"""Train a small ResNet on scikit-learn's images of digits under the plan that autopar makes.

    torchrun --standalone --nproc-per-node 4 examples/train_resnet.py --minutes 1
    python examples/train_resnet.py --steps 100

The same arguments give the same loss curve on any number of ranks and in any mode.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from typing import Any

import quiet  # noqa: F401
import torch
from budget import INTERRUPTED, Budget, parsed, positive, start
from display import Display
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import autopar
from autopar.models.resnet import ResNet, ResNetConfig

WARMUP_STEPS = 10
SIZE = 32
HELD_OUT = 320
CONFIG = ResNetConfig((1, 1, 1, 1), bottleneck=False, width=16, classes=10, channels=1)


@dataclass(frozen=True)
class Digits:
    """Images of (N, 1, SIZE, SIZE) with mean 0 and deviation 1, and which digit each is."""

    images: Tensor
    labels: Tensor

    @classmethod
    def split(cls) -> tuple[Digits, Digits]:
        """Those to learn from and those held out: the same on every rank."""
        found = load_digits()
        images = torch.from_numpy(found.images).float()[:, None]
        images = F.interpolate((images - images.mean()) / images.std(), size=(SIZE, SIZE), mode="bilinear")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], torch.from_numpy(found.target).long()[order]
        return cls(images[HELD_OUT:], labels[HELD_OUT:]), cls(images[:HELD_OUT], labels[:HELD_OUT])

    def batch(self, number: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The batch of a number: the same on any rank, in any run with the same seed."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        chosen = torch.randint(len(self.images), (size,), generator=generator)
        return self.images[chosen], self.labels[chosen]


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a small ResNet on digits under the plan that autopar makes.")
    parser.add_argument("--batch", type=positive, default=64, help="images a global batch (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: %(default)s)")
    return parsed(parser)


def learning_rate(highest: float, budget: Budget) -> float:
    """A linear warm-up over some steps, then a cosine down to nothing over the whole run."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * budget.fraction)
    return highest * min(1.0, (budget.step + 1) / WARMUP_STEPS) * cosine


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of digits that the trained weights tell right.

    A compiled model keeps the loss alone and no logits, so its weights are gathered into a plain model, on every rank
    as gathering takes all of them.
    """
    plain = ResNet(CONFIG)
    plain.load_state_dict({name: value.full_tensor() if hasattr(value, "full_tensor") else value
                           for name, value in model.state_dict().items()})
    with torch.no_grad():
        return float((plain.eval()(digits.images).argmax(1) == digits.labels).float().mean())


def main() -> int:
    """Train; 0 if the loss fell."""
    arguments = options()
    autopar.init()
    train, held_out = Digits.split()
    torch.manual_seed(arguments.seed)
    shape = arguments.batch, arguments.seed
    # Every rank passes the whole batch, as in train_gpt2.py; the loss is made of the output and the last argument.
    model: Any = autopar.compile(ResNet(CONFIG), inputs=train.batch(0, *shape), batch="global", mode=arguments.mode,
                                 loss_fn=F.cross_entropy, precision="fp32")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    display = Display("images", arguments.batch)
    display.plan(model.plan, model)
    display.say(f"data   {len(train.labels)} images of digits, {len(held_out.labels)} others held out")
    if arguments.plan_out and torch.distributed.get_rank() == 0:
        model.plan.save(arguments.plan_out)
    budget = Budget(arguments.steps, arguments.minutes)
    if arguments.resume:
        progress = autopar.load_checkpoint(arguments.resume, model, optimizer)
        display.losses += progress["losses"]
        budget.resume(progress["step"], progress["seconds"])
        display.say(f"going on from step {budget.step} in {arguments.resume}")

    def check() -> str:
        found = f"{100 * accuracy(model, held_out):.1f} % of held-out digits right"
        display.say(f"step {budget.step:>5}   {found}")
        if arguments.save:
            autopar.save_checkpoint(arguments.save, model, optimizer, step=budget.step, seconds=budget.seconds,
                                    losses=display.losses)
        return found

    display.begin()
    while not budget.over:
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(arguments.lr, budget)
        loss = model(*train.batch(budget.step, *shape))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        budget.advance()
        display.step(budget, loss.item(), time.monotonic() - began)
        if budget.at_mark:
            check()
    fell = display.end(check(), budget.stopped)
    return INTERRUPTED if budget.stopped else int(not fell)


if __name__ == "__main__":
    start(main)
