"""Tiny models with inputs and losses, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.core.cluster import Cluster
from autopar.models.resnet import ResNet, ResNetConfig


def quick(world_size: int) -> Cluster:
    """Local processes with links so quick that it pays to cut tiny models too."""
    return replace(Cluster.preset(f"cpu:{world_size}"), latency_s=((1e-8,),))


@dataclass(frozen=True)
class Case:
    """A model in train mode, the arguments of a call on the global batch, and what makes a loss of its output."""

    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    loss_fn: Callable[[Any, Any], Tensor] | None = None

    def call(self, model: nn.Module, inputs: Any = None) -> Tensor:
        """The loss of a compiled model; `inputs` instead of the case's own."""
        given = self.inputs if inputs is None else inputs
        output = model(**given) if isinstance(given, dict) else model(*given)
        return output if isinstance(output, Tensor) else output.loss

    def plain_loss(self, model: nn.Module) -> Tensor:
        """The loss of the plain model."""
        if self.loss_fn is None:
            return self.call(model)
        *inputs, target = self.inputs
        return self.loss_fn(model(*inputs), target)

    def part(self, rank: int, world_size: int) -> Any:
        """The arguments with one rank's part of the batch."""
        def cut(x: Tensor) -> Tensor:
            return x.chunk(world_size)[rank]
        return {n: cut(x) for n, x in self.inputs.items()} if isinstance(self.inputs, dict) else tuple(
            cut(x) for x in self.inputs)


def gpt2(dropout: float = 0.0, layers: int = 2, vocab: int = 96, batch: int = 8) -> Case:
    """GPT-2 with 4 heads, padded labels that are spread unevenly over the batch."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_head=4, n_embd=32, vocab_size=vocab, n_positions=32, use_cache=False,
                        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0)
    tokens = torch.randint(0, vocab, (batch, 16))
    labels = tokens.clone()
    labels[0, 3:9] = -100
    labels[-1] = -100
    return Case(GPT2LMHeadModel(config).train(), {"input_ids": tokens, "labels": labels})


def resnet(batch: int = 8, size: int = 48) -> Case:
    """ResNet of five bottlenecks on small images.

    Weights and images are ones that rounding moves little: weights off by 1e-7 of themselves move gradients by 8e-6.
    With others a pre-activation next to 0 changes sign, which moves them by 2e-2.
    """
    torch.manual_seed(1)
    model = ResNet(ResNetConfig((1, 2, 1, 1), width=8, classes=8)).train()
    return Case(model, (torch.randn(batch, 3, size, size), torch.randint(0, 8, (batch,))), F.cross_entropy)


def mlp(batch: int = 8) -> Case:
    """Two equal blocks and a head."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)]
    model = nn.Sequential(*blocks, nn.Linear(16, 8)).train()
    return Case(model, (torch.randn(batch, 16), torch.randint(0, 8, (batch,))), F.cross_entropy)


CASES: dict[str, Callable[..., Case]] = {"gpt2": gpt2, "resnet": resnet, "mlp": mlp}
