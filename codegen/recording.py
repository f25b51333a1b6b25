"""What a model's constructor does to its parameters, recorded op by op and done again for one of them at a time.

Tensors are recorded as boxes of storages, so that views and `.data` are what they are. A storage that no op made, such
as that of `torch.tensor([1, 2])`, is kept by value. Random ops draw from a seed of their own, which their place in the
record decides: a parameter's values depend on no other parameter, and not on which rank makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.codegen.private import StorageWeakRef, TorchDispatchMode
from autopar.core.errors import AutoparError
from autopar.passes.blame import here

aten = torch.ops.aten
WRITES_ALL = {aten.normal_.default, aten.uniform_.default, aten.fill_.Scalar, aten.zero_.default, aten.copy_.default}
"""Ops whose first argument has no part in its new value."""
CPU = torch.device("cpu")
SEEDS, SPREAD = 2**63, 1_000_003


@dataclass(frozen=True, slots=True)
class Box:
    """A tensor as a part of storage number `storage`; sizes in elements."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Call:
    """One op, or function of torch.nn.init: its arguments with boxes in the place of tensors, the boxes it reads, and
    those of its results."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[Box, ...]
    results: tuple[Box, ...]
    overwrites: int | None
    """The storage of which nothing is left from before."""
    draws: bool


@dataclass(eq=False)
class Record:
    """All calls, in order, and what is known of storages: their numbers, who wrote to them, and given values."""

    calls: list[Call] = field(default_factory=list)
    numbers: dict[StorageWeakRef, int] = field(default_factory=dict)
    writers: dict[int, list[int]] = field(default_factory=dict)
    given: dict[int, Tensor] = field(default_factory=dict)
    nbytes: dict[int, int] = field(default_factory=dict)

    def alive(self) -> bool:
        """Whether a tensor that was recorded is still there."""
        return not all(storage.expired() for storage in self.numbers)

    def knows(self, tensor: Tensor) -> bool:
        """Whether the values of `tensor` can be made again."""
        number = self.numbers.get(StorageWeakRef(tensor.untyped_storage()))
        return number is not None and all(box.storage in self.writers or box.storage in self.given
                                          for i in self.needed(number) for box in self.calls[i].reads)

    def value(self, tensor: Tensor, seed: int) -> Tensor:
        """The values that `tensor`, which is on meta, would have; on the CPU, no more being held at a time than it and
        what it was made of."""
        box = self.box(tensor)
        replay = _Replay(self, seed)
        for i in self.needed(box.storage):
            replay.call(i)
        return replay.tensor(box)

    def needed(self, storage: int) -> list[int]:
        """The calls that decide what is in a storage, in order."""
        found: set[int] = set()
        waiting = [(storage, len(self.calls))]
        while waiting:
            number, before = waiting.pop()
            for i in reversed([i for i in self.writers.get(number, ()) if i < before]):
                if i not in found:
                    found.add(i)
                    reads = {box.storage for box in self.calls[i].reads} - {self.calls[i].overwrites}
                    waiting += [(read, i) for read in reads]
                if self.calls[i].overwrites == number:
                    break
        return sorted(found)

    def box(self, tensor: Tensor) -> Box:
        """The box of a tensor, of a known storage or not."""
        storage = tensor.untyped_storage()
        number = self.numbers.setdefault(StorageWeakRef(storage), len(self.numbers))
        self.nbytes[number] = storage.nbytes()
        return Box(number, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def add(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Record a call that was made."""
        boxed: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, self.box, (args, kwargs))
        results = tuple(self.box(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor))
        reads = tuple(leaf for leaf in pytree.tree_leaves(boxed) if isinstance(leaf, Box))
        written = _written(op, *boxed) | {box.storage for box in results} - {box.storage for box in reads}
        if not written:  # a view, or a value that was looked at
            return
        whole = reads[0].storage if op in WRITES_ALL and self._covers(reads[0]) else None
        made = next(iter(written)) if not {box.storage for box in reads} & written and len(written) == 1 else None
        self._append(Call(op, boxed[0], boxed[1], reads, results, made if whole is None else whole,
                          torch.Tag.nondeterministic_seeded in op.tags), written)

    def add_fill(self, function: Any, kwargs: dict[str, Any]) -> None:
        """Record a function of torch.nn.init, which would fill the tensor it is given first."""
        boxed = pytree.tree_map_only(Tensor, self.box, kwargs)
        box = next(iter(boxed.values()))
        whole = box.storage if self._covers(box) else None
        self._append(Call(function, (), boxed, (box,), (box,), whole, True), {box.storage})

    def _append(self, call: Call, written: set[int]) -> None:
        for number in written:
            self.writers.setdefault(number, []).append(len(self.calls))
        self.calls.append(call)

    def keep(self, tensors: list[Tensor]) -> None:
        """Keep the values of those tensors that no call made."""
        for tensor in tensors:
            number = self.box(tensor).storage
            if number not in self.writers and number not in self.given and not tensor.is_meta:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage().cpu())
                self.given[number] = whole.clone()

    def _covers(self, box: Box) -> bool:
        whole = torch.Size(box.size).numel() * box.dtype.itemsize == self.nbytes[box.storage]
        return whole and len(set(box.stride)) == len(box.stride)


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """The storages of arguments that `op` writes to."""
    given = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    return {leaf.storage for argument in op._schema.arguments if argument.is_write and argument.name in given
            for leaf in pytree.tree_leaves(given[argument.name]) if isinstance(leaf, Box)}


class Recorder(TorchDispatchMode):
    """While it is entered, every op on tensors goes into `record`. Raises AutoparError for one that tells values of
    tensors on meta."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        named = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, named)) if isinstance(leaf, Tensor)]
        if torch.Tag.data_dependent_output in op.tags and any(tensor.is_meta for tensor in tensors):
            raise AutoparError(f"a constructor looks at the values of a tensor{here()}, which are not there yet under "
                               "autopar.empty(); build that module before, and put it into the model here: it then "
                               "has values of its own")
        self.record.keep(tensors)
        result = op(*args, **named)
        self.record.add(op, args, named, result)
        return result


class _Replay:
    """Some calls of a record, made again on the CPU."""

    def __init__(self, record: Record, seed: int) -> None:
        self._record, self._seed = record, seed
        self._held: dict[int, Any] = {}

    def tensor(self, box: Box) -> Tensor:
        """What is in a box by now."""
        if box.storage not in self._held:
            given = self._record.given.get(box.storage)
            fresh = torch.empty(self._record.nbytes[box.storage], dtype=torch.uint8) if given is None else given.clone()
            self._held[box.storage] = fresh.untyped_storage()
        return _view(self._held[box.storage], box)

    def call(self, place: int) -> None:
        """Make the call at `place`."""
        each = self._record.calls[place]
        args, kwargs = pytree.tree_map_only(Box, self.tensor, (each.args, each.kwargs))
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: CPU, (args, kwargs))
        args, kwargs = pytree.tree_map_only(torch.Generator, lambda _: None, (args, kwargs))
        with torch.no_grad():
            found = _seeded(lambda: each.op(*args, **kwargs), each, (self._seed * SPREAD + place) % SEEDS)
        made = [t for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]
        for box, result in zip(each.results, made, strict=True):
            if box.storage not in self._held:
                self._held[box.storage] = self._as_recorded(box, result)

    def _as_recorded(self, box: Box, result: Tensor) -> Any:
        """The storage of a new tensor, laid out as it was when recorded."""
        if (tuple(result.stride()), result.storage_offset()) == (box.stride, box.offset):
            return result.untyped_storage()
        storage = torch.empty(self._record.nbytes[box.storage], dtype=torch.uint8).untyped_storage()
        _view(storage, box).copy_(result)
        return storage


def _view(storage: Any, box: Box) -> Tensor:
    return torch.empty(0, dtype=box.dtype).set_(storage, box.offset, box.size, box.stride)


def _seeded(act: Callable[[], Any], each: Call, seed: int) -> Any:
    """What a call returns; one that draws does so from `seed`, and the state of others is left alone."""
    if not each.draws:
        return act()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return act()
