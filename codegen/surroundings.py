"""What a script puts around a compiled model that plain models heed: refused, or left outside of its forward."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autopar.core.errors import AutoparError
from autopar.gpu import why_no_gpu

log = logging.getLogger("autopar")
_SAID: list[str] = []


@contextlib.contextmanager
def apart(device: torch.device, precision: str) -> Iterator[None]:
    """Inside, neither autocast, which is told once, nor inference mode: what is gathered there could not be trained."""
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            told = f"autocast is on around a model that computes in {precision}, as it was compiled; leave autocast out"
            if told not in _SAID:
                _SAID.append(told)
                log.warning(told)
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


def check_moved(change: Callable[[Tensor], Tensor], like: Tensor) -> None:
    """Raises AutoparError where `change`, that of `model.to` and its kin, makes tensors of another dtype or device."""
    probe = torch.empty((), dtype=like.dtype, device=like.device)
    try:
        made = change(probe)
    except (AssertionError, RuntimeError) as error:
        if torch.cuda.is_available():
            raise
        raise AutoparError(f"a compiled model on {like.device} is to go to a GPU, and torch.cuda finds none on this "
                           f"machine: {why_no_gpu()}") from error
    if (made.dtype, made.device) != (probe.dtype, probe.device):
        raise AutoparError(f"a compiled model of {probe.dtype} on {probe.device} is to be one of {made.dtype} on "
                           f"{made.device}; give precision= to autopar.compile, which runs on this rank's device")


class Compiled(nn.Module):
    """What a compiled model refuses, before its first call and after it. Abstract."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What `to`, `half`, `cuda` and their kin do. Raises AutoparError for another dtype or device."""
        for tensor in (*self.parameters(), *self.buffers()):
            check_moved(fn, tensor)
        return self

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Any:
        """What DistributedDataParallel asks of a module first."""
        raise parallel_already()


def parallel_already() -> AutoparError:
    """What is said where a compiled model is wrapped for several ranks."""
    return AutoparError("a compiled model is parallel already; use it as it is, without DistributedDataParallel")
