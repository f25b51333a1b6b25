"""Bytes that one run of a lowered segment comes to: what it keeps for the backward, and the most that it works with.

The program is run on meta, forward and backward, as autograd runs it, and its storages are followed op by op. No
values, no device. Fused attention takes the place of the op that would choose a kernel by device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autopar.codegen import private
from autopar.codegen.arrivals import Arrival
from autopar.codegen.live import Live, rounded

aten = torch.ops.aten
META = torch.device("meta")
Run = Callable[..., Sequence[Tensor]]
Backward = Callable[[list[Tensor], Sequence[Tensor], Live], None]
"""Runs the backward of results, which it lets go, to leaves, whose peak `Live` has from then on."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on a device, beside what a segment is given.

    `saved` is kept from its forward to its backward, its own arguments and results aside; of those, arguments number
    `arguments` and results number `results` are read by the backward. `results_bytes` are its results', 0 for one that
    shares an argument's memory. `forward` is the most there is during the forward, with results and what is saved by
    then; `backward` the most during the backward, with what is still saved, the gradients of results and those made.
    """

    saved: int
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    results_bytes: tuple[int, ...]
    forward: int
    backward: int


class Kernels(fx.Interpreter):
    """Runs a lowered graph with attention as the fused kernel of a kind of device, which needs no device."""

    def __init__(self, module: fx.GraphModule, kind: str) -> None:
        super().__init__(module)
        self.kind = kind

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """The results, of which nothing is kept here."""
        found: Sequence[Tensor] = self.run(*arguments)
        self.env.clear()
        return found

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is aten.scaled_dot_product_attention.default:
            return private.fused_attention(self.kind, *args, **kwargs)
        return super().call_function(target, args, kwargs)


class _Ends(torch.autograd.Function):
    """A loss of any tensors, so that their gradients are made in the backward and let go when they are used."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.of = [(x.shape, x.dtype, x.device) for x in tensors]
        return torch.empty((), device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.of)


def by_autograd(results: list[Tensor], _: Sequence[Tensor], live: Live) -> None:
    """The backward of `results`, which are let go, as a part of a larger one."""
    loss = ends_of(results)
    assert loss is not None
    results.clear()
    live.restart()
    loss.backward()


def by_tape(results: list[Tensor], leaves: Sequence[Tensor], live: Live) -> None:
    """The backward of `results` as `codegen.tape` runs it: the gradients that come to it are held throughout."""
    live.restart()
    made = [x for x in results if x.requires_grad]
    results.clear()
    grads = [torch.empty_like(x) for x in made]
    found = torch.autograd.grad(made, leaves, grads, allow_unused=True)
    del found


def footprint(run: Run, given: Sequence[Arrival], seeds: int, device: torch.device = META, grain: int = 1,
              backward: Backward = by_autograd) -> Footprint:
    """The bytes of `run(*given, *seeds)` on `device`, and of its `backward`, by default as autograd runs it."""
    arguments = [each.blank(device) for each in given] + [torch.zeros((), dtype=torch.int64, device=device)] * seeds
    arguments_read, results_read = _read(run, arguments)
    with Live(device.type, grain) as live:
        live.hold(arguments)
        held = live.bytes
        results: list[Tensor] = list(run(*arguments))
        forward = live.peak - held
        own = [rounded(nbytes, grain) for nbytes in _own(results, arguments)]
        saved = live.bytes - held - sum(own)
        leaves = [x for x in arguments if x.requires_grad]
        flows = any(x.requires_grad for x in results)
        if flows:
            backward(results, leaves, live)
    return Footprint(saved, arguments_read, results_read, tuple(own), forward, live.peak - held if flows else 0)


def ends_of(results: Sequence[Tensor]) -> Tensor | None:
    """A loss whose backward is that of `results`, None where no gradient flows."""
    ends = [x for x in results if x.requires_grad]
    loss: Tensor | None = _Ends.apply(*ends) if ends else None  # type: ignore[no-untyped-call]
    return loss


def _own(results: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[int]:
    """The bytes of each result; those of a storage that an argument has, or an earlier result, are 0."""
    known = {private.storage_key(x) for x in arguments}
    found = []
    for result in results:
        key = private.storage_key(result)
        found.append(0 if key in known else result.untyped_storage().nbytes())
        known.add(key)
    return found


def _read(run: Run, arguments: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which arguments and results the backward reads, by the storages that autograd saves."""
    saved: set[int] = set()
    alive: list[Tensor] = []  # a storage's key is told again once it is gone

    def pack(x: Tensor) -> Tensor:
        alive.append(x.detach())
        saved.add(private.storage_key(x))
        return alive[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = list(run(*arguments))
    return (tuple(i for i, x in enumerate(arguments) if private.storage_key(x) in saved),
            tuple(i for i, x in enumerate(results) if private.storage_key(x) in saved))
