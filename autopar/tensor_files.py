"""Storage for torch.distributed.checkpoint: one safetensors file a rank and a table of what lies where, no pickle.

A chunk is a box of one tensor; the table says for each tensor its dtype, size and chunks, and for each file its size
in bytes and its CRC-32.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
Shape = tuple[int, ...]
BLOCK = 1 << 24
"""Bytes read at a time for a checksum."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The box of a tensor from `offsets` on, at byte `begin` of `file`."""

    offsets: Shape
    sizes: Shape
    file: str
    begin: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole tensor and the chunks that make it up."""

    dtype: torch.dtype
    size: Shape
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class FileMark:
    """What a file must be: its size in bytes and its CRC-32."""

    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Table:
    """All tensors and files of a folder."""

    tensors: dict[str, Entry]
    files: dict[str, FileMark]

    def to_json(self) -> dict[str, Any]:
        """The table as plain lists and numbers."""
        tensors = {name: {"dtype": CODES[e.dtype], "size": list(e.size),
                          "chunks": [[list(c.offsets), list(c.sizes), c.file, c.begin] for c in e.chunks]}
                   for name, e in self.tensors.items()}
        return {"tensors": tensors, "files": {n: {"bytes": m.nbytes, "crc32": m.crc32} for n, m in self.files.items()}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Table:
        """The inverse of `to_json`."""
        tensors = {name: Entry(DTYPES[e["dtype"]], tuple(e["size"]),
                               tuple(Chunk(tuple(o), tuple(s), file, begin) for o, s, file, begin in e["chunks"]))
                   for name, e in data["tensors"].items()}
        return cls(tensors, {name: FileMark(m["bytes"], m["crc32"]) for name, m in data["files"].items()})


def nbytes_of(sizes: Shape, dtype: torch.dtype) -> int:
    """The size in bytes of a tensor."""
    return math.prod(sizes) * dtype.itemsize


def checksum(path: Path) -> int:
    """The CRC-32 of a file. Raises OSError."""
    found = 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            found = zlib.crc32(block, found)
    return found


class Writer(StorageWriter):
    """Writes what each rank is given to `folder`/rank-<rank>.safetensors; `table` is there afterwards, on rank 0."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._file = folder, f"rank-{rank:05}.safetensors"
        self.table: Table | None = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the chunks of `plan`, largest dtype first, so that each is aligned to its elements."""
        items = sorted(plan.items, key=lambda item: -_shape_of(item)[1].itemsize)
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(items, planner) if items else [])
        return done

    def _write(self, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        header, begins = _header(items)
        crc = zlib.crc32(header)
        with (self._folder / self._file).open("wb") as stream:
            stream.write(header)
            for item in items:
                data = _bytes_of(planner.resolve_data(item))
                crc = zlib.crc32(data, crc)
                stream.write(data)
            nbytes = stream.tell()
            stream.flush()
            os.fsync(stream.fileno())
        mark = FileMark(nbytes, crc)
        return [WriteResult(item.index, nbytes_of(*_shape_of(item)), (self._file, begin, mark))
                for item, begin in zip(items, begins, strict=True)]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Put together the table of what all ranks have written."""
        places = {r.index: r.storage_data for each in results for r in each}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = ((tuple(c.offsets), tuple(c.sizes), places[MetadataIndex(name, c.offsets)]) for c in tensor.chunks)
            tensors[name] = Entry(tensor.properties.dtype, tuple(tensor.size),
                                  tuple(Chunk(offsets, sizes, *place[:2]) for offsets, sizes, place in chunks))
        self.table = Table(tensors, {file: mark for file, _, mark in places.values()})

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder is there already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by name."""
        return False


def _shape_of(item: WriteItem) -> tuple[Shape, torch.dtype]:
    assert item.tensor_data is not None, item.index
    return tuple(item.tensor_data.chunk.sizes), item.tensor_data.properties.dtype


def _header(items: list[WriteItem]) -> tuple[bytes, list[int]]:
    """The head of a safetensors file (its length in 8 bytes, then JSON) and where each item's bytes begin.

    A chunk that is no whole tensor goes by `name@offsets`.
    """
    table, place, ends = {}, 0, []
    for item in items:
        sizes, dtype = _shape_of(item)
        assert item.tensor_data is not None
        whole = tuple(item.tensor_data.size) == sizes
        name = item.index.fqn if whole else f"{item.index.fqn}@{','.join(map(str, item.tensor_data.chunk.offsets))}"
        end = place + nbytes_of(sizes, dtype)
        table[name] = {"dtype": CODES[dtype], "shape": list(sizes), "data_offsets": [place, end]}
        ends.append(place)
        place = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + end for end in ends]


def _bytes_of(tensor: Any) -> memoryview:
    assert isinstance(tensor, Tensor)
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class Reader(StorageReader):
    """Reads from `folder` what a rank needs of the tensors in `table`."""

    def __init__(self, folder: Path, table: Table) -> None:
        self._folder, self._table = folder, table
        self._chunks = {(name, c.offsets): (e.dtype, c) for name, e in table.tensors.items() for c in e.chunks}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table in torch's words."""
        return Metadata({name: TensorStorageMetadata(
            TensorProperties(e.dtype), torch.Size(e.size),
            [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in e.chunks])
            for name, e in self._table.tensors.items()})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what is asked for out of the files, each mapped into memory once."""
        for item, part in self._parts(plan.items):
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _parts(self, items: list[ReadItem]) -> Iterator[tuple[ReadItem, Tensor]]:
        mapped: dict[str, Tensor] = {}
        for item in items:
            offset = item.storage_index.offset
            assert offset is not None, item
            dtype, chunk = self._chunks[item.storage_index.fqn, tuple(offset)]
            if chunk.file not in mapped:
                mapped[chunk.file] = torch.from_file(str(self._folder / chunk.file), dtype=torch.uint8,
                                                     size=self._table.files[chunk.file].nbytes)
            flat = mapped[chunk.file][chunk.begin:chunk.begin + nbytes_of(chunk.sizes, dtype)].view(dtype)
            box = (slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            yield item, flat.view(chunk.sizes)[tuple(box)]

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one load to the next."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The table is known already."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by name."""
        return False
