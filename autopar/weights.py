"""Named tensors in files: safetensors as Hugging Face lays them out, and checkpoints of this package.

Headers are read first, so that what does not fit is known before anything is loaded; a tensor's bytes are mapped into
memory when it is asked for, and let go of with it. No pickle is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autopar import checkpoint
from autopar.core.errors import AutoparError
from autopar.core.files import entry, read_object
from autopar.tensor_files import DTYPES, Chunk, Entry, Shape, Table, nbytes_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MOST_HEADER = 100_000_000
"""Bytes; the format's own limit."""
_LENGTH = 8


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors in `folder`, told by `source` in messages.

    `fits(size in the file, plain shape)`: whether a tensor is one of that shape. `checked` are files with checksums.
    """

    source: Path
    folder: Path
    tensors: dict[str, Entry]
    nbytes: dict[str, int]
    fits: Callable[[Shape, Shape], bool]
    checked: Table | None

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, mapped where it is in one piece. Raises OSError."""
        found = self.tensors[name]
        if len(found.chunks) == 1:
            return self._chunk(found.chunks[0], found.dtype)
        whole = torch.empty(found.size, dtype=found.dtype)
        for chunk in found.chunks:
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box] = self._chunk(chunk, found.dtype)
        return whole

    def _chunk(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        mapped = torch.from_file(str(self.folder / chunk.file), dtype=torch.uint8, size=self.nbytes[chunk.file])
        flat = mapped[chunk.begin:chunk.begin + nbytes_of(chunk.sizes, dtype)]
        aligned = flat if flat.data_ptr() % dtype.itemsize == 0 else flat.clone()
        return aligned.view(dtype).view(chunk.sizes)


def open_weights(path: Path) -> Weights:
    """The tensors of a safetensors file, of a folder with one or with an index of several, or of a checkpoint.

    Raises AutoparError for anything else.
    """
    if path.is_file():
        return _of_files(path, path.parent, {path.name: None})
    if not path.is_dir():
        raise AutoparError(f"{path} is no file and no folder; check the name")
    if (path / checkpoint.HEAD).exists() or checkpoint.numbered(path):
        return _of_checkpoint(path)
    if (path / INDEX).exists():
        return _of_files(path, path, _indexed(path / INDEX))
    inside = sorted(each.name for each in path.glob("*.safetensors"))
    if SINGLE in inside or len(inside) == 1:
        return _of_files(path, path, {SINGLE if SINGLE in inside else inside[0]: None})
    raise AutoparError(f"{path} has no {SINGLE}, no {INDEX} and no checkpoint (safetensors files found: "
                       f"{len(inside)}); save the model as safetensors first, as pickles are not read")


def _of_checkpoint(path: Path) -> Weights:
    chosen = checkpoint.choose(path)
    table = checkpoint.table_of(chosen)
    tensors = {name: e for name, e in table.tensors.items() if "/" not in name}
    return Weights(chosen, chosen, tensors, {n: m.nbytes for n, m in table.files.items()}, _merges, table)


def _merges(size: Shape, shape: Shape) -> bool:
    """Whether `shape` is `size` with some neighbouring dims made one."""
    rest = list(size)
    for wanted in shape:
        product = rest.pop(0) if rest else 0
        while product < wanted and rest:
            product *= rest.pop(0)
        if product != wanted:
            return False
    return not rest


def _indexed(index: Path) -> dict[str, set[str] | None]:
    """The files that an index names, with the tensors each has to have."""
    files: dict[str, set[str] | None] = {}
    for name, file in entry(read_object(index), "weight_map", dict).items():
        if not isinstance(file, str) or Path(file).name != file:
            raise AutoparError(f"{index} puts {name} into {file!r}, needed is the name of a file beside it")
        held = files.setdefault(file, set())
        assert held is not None
        held.add(name)
    return files


def _of_files(source: Path, folder: Path, files: dict[str, set[str] | None]) -> Weights:
    tensors: dict[str, Entry] = {}
    nbytes: dict[str, int] = {}
    for file, wanted in sorted(files.items()):
        held, nbytes[file] = read_header(folder / file)
        missing = sorted((wanted or set()) - held.keys())
        if missing:
            raise AutoparError(f"{folder / file} lacks {missing[0]}, which {INDEX} puts there; get the files again")
        tensors |= held if wanted is None else {name: held[name] for name in wanted}
    return Weights(source, folder, tensors, nbytes, _equal, None)


def _equal(size: Shape, shape: Shape) -> bool:
    return size == shape


def read_header(path: Path) -> tuple[dict[str, Entry], int]:
    """The tensors of a safetensors file, and its size in bytes. Raises AutoparError when it is not whole."""
    try:
        total = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH), "little")
            text = stream.read(length) if length <= min(MOST_HEADER, total - _LENGTH) else b""
    except OSError as error:
        raise AutoparError(f"cannot read {path}: {error.strerror}; check the name") from error
    try:
        table = json.loads(text)
        tensors = {name: _entry(told, path.name, _LENGTH + length) for name, told in table.items()
                   if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AutoparError(f"{path} is not a whole safetensors file ({type(error).__name__} in its header); get it "
                           "again, or name another") from error
    end = max((c.begin + nbytes_of(c.sizes, e.dtype) for e in tensors.values() for c in e.chunks), default=0)
    if end > total:
        raise AutoparError(f"{path} has {total} bytes, its header tells of {end}: it is cut short; get it again")
    return tensors, total


def _entry(told: dict[str, Any], file: str, data: int) -> Entry:
    """A header's entry. Raises ValueError, KeyError or TypeError when it is not as the format has it."""
    dtype, size, (begin, end) = DTYPES[told["dtype"]], tuple(told["shape"]), told["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*size, begin)) or end - begin != nbytes_of(size, dtype):
        raise ValueError(f"shape {size} does not fill bytes {begin} to {end}")
    return Entry(dtype, size, (Chunk((0,) * len(size), size, file, data + begin),))
