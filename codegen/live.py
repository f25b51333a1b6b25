"""Bytes of tensors that are alive, op by op: what a program holds at its fullest moment, on meta or on any device.

A storage counts from the op that makes it until nothing refers to it or its memory is given up (as FSDP2 does with
gathered parameters). What kernels allocate inside of themselves is not seen, but for what `codegen.rooms` tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.codegen import private
from autopar.codegen.rooms import ROOMS, room_of


def rounded(nbytes: float, grain: int) -> int:
    """The least multiple of `grain` that `nbytes` fit in."""
    return -int(-nbytes // grain) * grain


class Live(private.TorchDispatchMode):
    """While entered, follows the storages that ops make and those it was told of.

    `peak` is the bytes of the fullest moment since `restart`. Storages are rounded up to `grain` bytes, as an allocator
    does.
    """

    def __init__(self, device: str, grain: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device, self._grain = device, grain
        self._known: dict[int, private.StorageWeakRef] = {}
        self.peak = 0

    @property
    def bytes(self) -> int:
        """Bytes that are alive."""
        return sum(rounded(private.storage_bytes(each), self._grain) for each in self._known.values())

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Follow these from now on."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.device.type == self._device:
                reference = private.StorageWeakRef(local.untyped_storage())
                self._known[reference.cdata] = reference
        self._count()

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its local ops come here
        made = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor))
        name = func._schema.name.rpartition("::")[2]
        if name in ROOMS:
            self.peak = max(self.peak, self.bytes + int(room_of(name, args, False)))
        return made

    def _count(self) -> None:
        self._known = {key: reference for key, reference in self._known.items() if not reference.expired()}
        self.peak = max(self.peak, self.bytes)
