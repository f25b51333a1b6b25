"""Tensors in safetensors files, written and read by torch.distributed.checkpoint."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from autopar.tensor_files import DTYPES, Reader, Table, Writer, checksum


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """One of each dtype, odd sizes among them, with a scalar, an empty one and a strided one."""
    found = {f"of/{code}": torch.arange(3).to(dtype) for code, dtype in DTYPES.items()}
    return found | {"scalar": torch.tensor(0.1), "empty": torch.empty(0, 4), "strided": torch.arange(12.).view(3, 4).T}


def written(folder: Path, tensors: dict[str, Tensor]) -> Table:
    writer = Writer(folder, 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        save(dict(tensors), storage_writer=writer)
    assert writer.table is not None
    return Table.from_json(json.loads(json.dumps(writer.table.to_json())))


def test_comes_back_as_it_was(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    table = written(tmp_path, tensors)
    found = {name: torch.full(t.shape, 7).to(t.dtype) for name, t in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(found, storage_reader=Reader(tmp_path, table))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_files_are_safetensors_and_as_marked(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    table = written(tmp_path, tensors)
    (name, mark), = table.files.items()
    found = load_file(tmp_path / name)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) for n, t in tensors.items())
    assert (tmp_path / name).stat().st_size == mark.nbytes
    assert checksum(tmp_path / name) == mark.crc32
