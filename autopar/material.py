"""What a compiled model's parameters get their first values from, checked before any rank meets another."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar import checkpoint
from autopar.codegen.control import all_equal
from autopar.codegen.offers import digest
from autopar.codegen.recording import Record
from autopar.codegen.values import Values, as_on, held_by, own_values, seed_of_rank_zero, state_names
from autopar.core.errors import AutoparError
from autopar.core.reading import check_path
from autopar.core.told import some, told
from autopar.meta_start import recorded
from autopar.weights import Weights, open_weights

AS_BUILT = "model"


class Material(Protocol):
    """Where first values come from."""

    def check(self) -> None:
        """Raises AutoparError where ranks have different ones, or damaged ones; collective."""

    def values(self, plain: nn.Module, device: torch.device) -> Values:
        """A function from a name of `plain` to the whole tensor; collective, as the function is."""


@dataclass(frozen=True, slots=True)
class Own:
    """What the model holds on rank 0."""

    def check(self) -> None:
        """Rank 0's count."""

    def values(self, plain: nn.Module, device: torch.device) -> Values:
        """As they are."""
        return own_values(plain, device)


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """What the constructors of a model on meta would have given its parameters, and the buffers that they make of
    those, by name; what is not on meta is used as it is."""

    records: Mapping[str, Record]

    def check(self) -> None:
        """Ranks with different models are told by their programs."""

    def values(self, plain: nn.Module, device: torch.device) -> Values:
        """Each rank makes one tensor in turn, all of them at the same time, and hands it to the others."""
        held, own, seed = held_by(plain), own_values(plain, device), seed_of_rank_zero(device)
        names, world = list(self.records), dist.get_world_size()
        place = {name: i for i, name in enumerate(names)}
        ahead: dict[str, Tensor] = {}

        def value(name: str) -> Tensor:
            if name not in place:
                return own(name)
            if place[name] % world == 0:
                for mine in names[place[name] + dist.get_rank():][:1]:
                    ahead[mine] = self.records[mine].value(held[mine], seed)
            found = ahead.pop(name, None)
            return as_on(place[name] % world, torch.empty(held[name].shape, dtype=held[name].dtype)
                         if found is None else found, device)

        return value


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """Files of tensors, and the name in them of each tensor of the model that they have."""

    weights: Weights
    names: Mapping[str, str]

    def check(self) -> None:
        """Raises AutoparError where ranks see different files or a checksum is off."""
        if not all_equal(digest([sorted(self.weights.tensors.items()), sorted(self.names.items())])):
            raise AutoparError(f"the ranks see different files in {self.weights.source}; pass a folder that all of "
                               "them see, or copies of one")
        if self.weights.checked is not None:
            checkpoint.check_contents(self.weights.folder, self.weights.checked)

    def values(self, plain: nn.Module, device: torch.device) -> Values:
        """From the files, each rank reading its part; what they don't have, as it is on rank 0."""
        own = own_values(plain, device)
        return lambda name: self.weights.tensor(self.names[name]) if name in self.names else own(name)


def read_material(init: Any, model: nn.Module) -> Material:
    """What `init` stands for: None, "model" or a path. Raises AutoparError where `model` would lack values."""
    held = held_by(model)
    bare = [name for name, tensor in held.items() if tensor.is_meta]
    if init is None:
        if bare:
            raise AutoparError(f"tensors of the model are on meta, without values: {some(bare)}; pass init=, the path "
                               "of a checkpoint or 'model', or only plan it, with autopar.plan")
        return Own()
    if init == AS_BUILT:
        return _built(held, bare)
    if not isinstance(init, str | os.PathLike):
        raise AutoparError(f"init is {told(init)}, needed is the path of a checkpoint, or 'model' for the model's own "
                           "initialisation")
    weights = open_weights(Path(check_path("init", init)))
    names = names_in(weights, model)
    lacking = [name for name in bare if name not in names]
    if lacking:
        raise AutoparError(f"buffers of the model are on meta, and {weights.source} has no values for them, as they "
                           f"are not saved: {some(lacking)}; build the model under autopar.empty(), which leaves "
                           "buffers real, and make none that is not saved from parameters")
    return Loaded(weights, names)


def _built(held: dict[str, Tensor], bare: list[str]) -> Built:
    records = {name: record for name in bare if (record := recorded(held[name])) is not None}
    lost = [name for name in bare if name not in records]
    if lost:
        raise AutoparError(f"how the model initialises {some(lost)} was not recorded; build it, and convert or copy "
                           "it, under autopar.empty(), or pass a checkpoint as init=")
    return Built(records)


def names_in(weights: Weights, model: nn.Module) -> dict[str, str]:
    """The name in the files of each tensor that they have. Raises AutoparError unless they are of `model`.

    One name of a tied tensor will do. Files of a Hugging Face base model lack its prefix, and may have more of what
    the model's class says to leave aside.
    """
    tensors, first = held_by(model), state_names(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = {**{name: name for name in tensors}, **first}
    found: dict[str, str] = {}
    for name, owner in known.items():
        for alias in (name, name.removeprefix(prefix)):
            if alias in weights.tensors:
                found.setdefault(owner, alias)
    used = {alias for name in known for alias in (name, name.removeprefix(prefix))}
    extra = [name for name in weights.tensors if name not in used and not _left_aside(model, name)]
    missing = [name for name in dict.fromkeys(first.values()) if name not in found]
    if missing or extra:
        raise AutoparError(f"{weights.source} is of another model: it lacks {missing[:3] or 'nothing'} and has "
                           f"{extra[:3] or 'nothing'} besides; build the model it was saved from")
    for owner, alias in found.items():
        _check_tensor(weights, alias, tensors[owner])
    return found


def _left_aside(model: nn.Module, name: str) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _check_tensor(weights: Weights, name: str, tensor: Tensor) -> None:
    saved = weights.tensors[name]
    if not weights.fits(saved.size, tuple(tensor.shape)):
        raise AutoparError(f"{name} has shape {list(saved.size)} in {weights.source}, the model needs "
                           f"{list(tensor.shape)}; build the model it was saved from")
    if saved.dtype != tensor.dtype and not (saved.dtype.is_floating_point and tensor.dtype.is_floating_point):
        raise AutoparError(f"{name} is of {saved.dtype} in {weights.source}, the model needs {tensor.dtype}, and only "
                           "floats are cast; build the model it was saved from")
