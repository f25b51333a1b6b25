"""What a written program is started with: options, values of the state, inputs."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar.codegen.communicator import Axes
from autopar.codegen.primitives import slice_
from autopar.codegen.source.rank import Rank
from autopar.codegen.source.state import Resting
from autopar.core.errors import AutoparError

Shape = tuple[int, ...]
SPREAD = 0.02
"""The standard deviation of random parameters."""


@dataclass(frozen=True, slots=True)
class Given:
    """An input of the whole batch, or a buffer: its shape, its dtype; random whole numbers are less than `below`.

    A step takes each rank's part of the samples, cut over the axes `samples`.
    """

    shape: Shape
    dtype: torch.dtype
    below: int = 2
    samples: Axes = ()


def options(description: str | None) -> argparse.Namespace:
    """The command line: `state` and `inputs` are paths or None."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", help="safetensors file of the plain model's state dict, and of such buffers as that "
                        "leaves out (default: random numbers by name, for buffers ones)")
    parser.add_argument("--inputs", help="safetensors file of the whole batch (default: random numbers)")
    parser.add_argument("--seed", type=int, default=0, help="of random numbers, dropout's included (default: 0)")
    return parser.parse_args()


def values(path: str | None, seed: int, parameters: Mapping[str, Resting], buffers: Mapping[str, Given]) -> Callable[
        [str], Tensor]:
    """From a name to its whole tensor: what the file at `path` has, else random parameters, the same on every rank, and
    ones for buffers of floats, zeros for others. Raises AutoparError when the file has not all, or in other shapes."""
    if path is not None:
        shapes = {name: each.shape for name, each in parameters.items()}
        return _read(path, shapes | {name: each.shape for name, each in buffers.items()}).__getitem__

    def value(name: str) -> Tensor:
        if name in parameters:
            return _random_parameter(name, parameters[name].shape, seed)
        return torch.full(buffers[name].shape, float(buffers[name].dtype.is_floating_point), dtype=buffers[name].dtype)
    return value


def inputs(path: str | None, seed: int, wanted: Mapping[str, Given], rank: Rank) -> dict[str, Tensor]:
    """This rank's part of the batch by name: of what the file at `path` has, else of random numbers.

    Raises AutoparError.
    """
    held = None if path is None else _read(path, {name: each.shape for name, each in wanted.items()})
    found = {name: held[name] if held is not None else _random_input(name, each, seed) for name, each in wanted.items()}
    parts = {name: slice_(x, rank.communicator.group(wanted[name].samples), 0) if wanted[name].samples else x
             for name, x in found.items()}
    return {name: x.to(rank.device, wanted[name].dtype) for name, x in parts.items()}


def _read(path: str, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
        held: dict[str, Tensor] = load_file(path)
    except ImportError:
        raise AutoparError(f"reading {path} needs safetensors; install it: pip install safetensors") from None
    except Exception as error:
        raise AutoparError(f"cannot read {path}: {error}; it has to be a whole safetensors file") from error
    lacking = [name for name in shapes if name not in held]
    if lacking:
        raise AutoparError(f"{path} lacks {', '.join(lacking[:3])}, {len(lacking)} of {len(shapes)} tensors needed; "
                           "save all of them, buffers too, by these names")
    wrong = next((name for name in shapes if tuple(held[name].shape) != shapes[name]), None)
    if wrong is not None:
        raise AutoparError(f"{wrong} has shape {tuple(held[wrong].shape)} in {path}, needed is {shapes[wrong]}")
    return held


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))


def _random_parameter(name: str, shape: Shape, seed: int) -> Tensor:
    """Near 0; factors, which are vectors called weight, near 1."""
    center = 1.0 if len(shape) < 2 and name.endswith("weight") else 0.0
    return center + SPREAD * torch.randn(shape, generator=_generator(name, seed))


def _random_input(name: str, wanted: Given, seed: int) -> Any:
    if wanted.dtype.is_floating_point:
        return torch.randn(wanted.shape, generator=_generator(name, seed))
    return torch.randint(wanted.below, wanted.shape, generator=_generator(name, seed))
