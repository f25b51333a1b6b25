"""Checkpoints of a running job, taken up again under any plan and on any number of ranks.

A folder holds the checkpoints of one run, `checkpoint-000001` and so on. Each holds what torch.distributed.checkpoint
planned in safetensors files, one a rank, and `checkpoint.json`: where each tensor lies, sizes and checksums of the
files, the optimizer's options, the dropout state and the caller's progress. No pickle is written or read. Tensors go
by the plain model's names, in the shape they are stored in, which depends on the model alone. A checkpoint appears
whole or not at all. All ranks must see the folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors
from torch.optim import Optimizer

from autopar import optimizer_state
from autopar.codegen.control import all_there
from autopar.codegen.offers import meet
from autopar.codegen.ranks import on_rank_zero, together
from autopar.codegen.runtime import ParallelModule
from autopar.core.errors import AutoparError
from autopar.core.files import entry, read_object
from autopar.core.reading import check_path
from autopar.core.told import told
from autopar.plain_json import decode, encode
from autopar.tensor_files import Reader, Table, Writer, checksum

FORMAT = "autopar checkpoint 1"
HEAD = "checkpoint.json"
KEPT = 2
"""The newest checkpoints that stay: should the last one be damaged later, there is one before it."""
Folder = str | os.PathLike[str]
log = logging.getLogger("autopar")
_NAME = re.compile(r"checkpoint-(\d{6,})")


@dataclass(frozen=True, slots=True)
class Head:
    """What `checkpoint.json` says."""

    table: Table
    optimizer: optimizer_state.Record | None
    random: dict[str, int]
    progress: dict[str, Any]


@all_there()
def save(folder: Folder, model: nn.Module, optimizer: Optimizer | None = None, **progress: Any) -> Path:
    """Write a checkpoint of everything that training goes on from; returns its own folder inside `folder`.

    `progress` are the caller's own values, such as a step or a scheduler's state_dict(): numbers, strings, tensors, and
    lists, tuples and dicts of them; rank 0's count. Collective. Raises AutoparError on all ranks when it can't be
    written, leaving earlier checkpoints as they were.
    """
    module, place = _compiled(model, optimizer), Path(check_path("the folder of checkpoints", folder))
    meet("save_checkpoint")
    record, state = optimizer_state.take(optimizer, _names(module)) if optimizer is not None else (None, {})
    record = None if record is None else optimizer_state.joined(record, list(module.model_names))
    head = {"optimizer": record, "random": module.random_state(), "progress": encode(progress, "progress")}
    draft = Path(on_rank_zero(lambda: str(_new_draft(place))))
    writer = Writer(draft, dist.get_rank())
    try:
        _together(lambda: write_tensors({**_tensors(module), **state}, storage_writer=writer))
        return Path(on_rank_zero(lambda: str(_put_in_place(draft, head, writer.table))))
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)


@all_there()
def load(folder: Folder, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Take up `model` and `optimizer` where a checkpoint left them; returns the progress given to `save`.

    `folder` is one checkpoint, or a folder of them, of which the newest whole one is taken. Without an optimizer only
    the model is loaded. Collective. Raises AutoparError on all ranks, before anything is changed, when there is no
    whole checkpoint or it is of another model or optimizer.
    """
    module, place = _compiled(model, optimizer), Path(check_path("the folder of checkpoints", folder))
    meet("load_checkpoint")
    names = _names(module)
    chosen = Path(on_rank_zero(lambda: str(choose(place))))
    head = parse_head(json.loads(on_rank_zero(lambda: json.dumps(read_object(chosen / HEAD)))))
    _together(lambda: check_contents(chosen, head.table))
    wanted = _tensors(module)
    _check_same_model(wanted, head.table, chosen, module.model_names)
    record = optimizer_state.held(head.optimizer, names)
    if optimizer is not None:
        optimizer_state.check(optimizer, names, record)
        assert record is not None
        wanted |= optimizer_state.targets(optimizer, names, record, head.table)
    _together(lambda: read_tensors(dict(wanted), storage_reader=Reader(chosen, head.table)))
    if optimizer is not None and record is not None:
        optimizer_state.put_back(optimizer, record, wanted)
    module.set_random_state(head.random)
    return head.progress


def latest(folder: Folder) -> Path | None:
    """The newest checkpoint in `folder` with all its files in their full sizes; None without one. Not collective."""
    for found in numbered(Path(check_path("the folder of checkpoints", folder))):
        try:
            check_whole(found)
        except AutoparError as error:
            log.warning("%s is passed over: %s", found, error)
        else:
            return found
    return None


def check_whole(checkpoint: Path) -> None:
    """Raises AutoparError unless every file of a checkpoint is there in its full size."""
    for name, mark in parse_head(read_object(checkpoint / HEAD)).table.files.items():
        path = checkpoint / name
        if not path.is_file():
            raise AutoparError(f"{path} is missing, needed are its {mark.nbytes} bytes; use an earlier checkpoint")
        found = path.stat().st_size
        if found != mark.nbytes:
            raise AutoparError(f"{path} has {found} bytes, needed are {mark.nbytes}: the checkpoint is cut short; use "
                               "an earlier one")


def table_of(checkpoint: Path) -> Table:
    """What lies where in a checkpoint. Raises AutoparError."""
    return parse_head(read_object(checkpoint / HEAD)).table


def parse_head(data: dict[str, Any]) -> Head:
    """What the object in a `checkpoint.json` says. Raises AutoparError when it is not as it was written."""
    if entry(data, "format", str) != FORMAT:
        raise AutoparError(f"'format' is {data['format']!r}, needed is {FORMAT!r}: another version wrote it")
    contents = entry(data, "contents", dict)
    if entry(data, "crc32", int) != _crc32(contents):
        raise AutoparError(f"the checksum in {HEAD} is off: it is damaged or was edited; use an earlier checkpoint")
    return Head(Table.from_json(contents["table"]), contents["optimizer"], contents["random"],
                decode(contents["progress"]))


def _crc32(contents: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(contents, sort_keys=True).encode())


# Folders, which rank 0 alone makes, moves and removes.


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not, newest first."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in inside if _number(path)), key=_number, reverse=True)


def _number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else 0


def _new_draft(folder: Path) -> Path:
    """An empty folder to write into; what earlier attempts left is removed."""
    draft = folder / f".checkpoint-{os.getpid()}"
    try:
        for left in folder.glob(".checkpoint-*"):
            shutil.rmtree(left)
        draft.mkdir(parents=True)
    except OSError as error:
        raise AutoparError(f"cannot write to {folder}: {error.strerror}; choose one that can be written") from error
    return draft


def _put_in_place(draft: Path, head: dict[str, Any], table: Table | None) -> Path:
    """Complete `draft`, move it to the next number, remove the oldest."""
    assert table is not None
    contents = {**head, "table": table.to_json()}
    before = numbered(draft.parent)
    target = draft.parent / f"checkpoint-{1 + max(map(_number, before), default=0):06}"
    try:
        with (draft / HEAD).open("w", encoding="utf-8") as stream:
            json.dump({"format": FORMAT, "crc32": _crc32(contents), "contents": contents}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        check_whole(draft)
        draft.rename(target)
    except OSError as error:
        raise AutoparError(f"cannot write {target}: {error.strerror}; free some space, or choose another folder"
                           ) from error
    for old in before[KEPT - 1:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def choose(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the newest whole one in it. Raises AutoparError."""
    if _number(folder) or (folder / HEAD).exists():
        check_whole(folder)
        return folder
    newest = latest(folder)
    if newest is None:
        seen = ", ".join(path.name for path in numbered(folder)) or "none at all"
        raise AutoparError(f"{folder} has no whole checkpoint (found: {seen}); check the name, or start without one")
    return newest


def check_contents(checkpoint: Path, table: Table) -> None:
    """Each rank reads its share of the files. Raises AutoparError when a checksum is off."""
    for name in sorted(table.files)[dist.get_rank()::dist.get_world_size()]:
        if checksum(checkpoint / name) != table.files[name].crc32:
            raise AutoparError(f"the checksum of {checkpoint / name} is off: it is damaged; use an earlier checkpoint")


def _together(act: Callable[[], Any]) -> None:
    """`act` on every rank. What fails on any rank is an AutoparError on all of them."""
    def checked() -> None:
        try:
            act()
        except OSError as error:
            raise AutoparError(str(error)) from error
        except CheckpointException as error:
            raise AutoparError("; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))) from error
    together(checked)


# The model.


def _compiled(model: nn.Module, optimizer: object) -> ParallelModule:
    if not hasattr(model, "random_state"):
        raise AutoparError(f"{type(model).__name__} has no plan yet, needed is a compiled model; give inputs= to "
                           "autopar.compile, or call the model once")
    if not isinstance(optimizer, Optimizer | None):
        raise AutoparError(f"optimizer is {told(optimizer)}, needed is a torch.optim.Optimizer or None")
    return cast(ParallelModule, model)


def _names(module: ParallelModule) -> optimizer_state.Names:
    return {id(parameter): name for name, parameter in module.named_parameters()}


def _tensors(module: ParallelModule) -> dict[str, Tensor]:
    """Parameters as they are stored, and buffers; reading into these changes the model."""
    return {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def _check_same_model(wanted: dict[str, Tensor], table: Table, chosen: Path, names: Sequence[str]) -> None:
    """`names` are all of the model, of which a rank of a pipeline holds some."""
    held = {name: entry.size for name, entry in table.tensors.items() if "/" not in name}
    missing, extra = sorted(set(names) - held.keys()), sorted(held.keys() - set(names))
    if missing or extra:
        raise AutoparError(f"{chosen} is of another model: it lacks {missing[:3] or 'nothing'} and has "
                           f"{extra[:3] or 'nothing'} besides; build the model it was saved from")
    for name, tensor in wanted.items():
        if tuple(tensor.shape) != held[name]:
            raise AutoparError(f"{name} has shape {list(held[name])} in {chosen}, the model needs "
                               f"{list(tensor.shape)}; build the model it was saved from")
