"""An optimizer's state by the names of parameters: to save it, and to put it back under another plan.

A record holds the optimizer's class, its groups (names and options) and for each state value how it comes back: laid
out like its parameter, whole on every rank, or a plain value. Tensors go by `parameter/key`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autopar.core.errors import AutoparError
from autopar.plain_json import decode, encode
from autopar.tensor_files import Table

Names = dict[int, str]
"""Names of parameters by identity."""
Record = dict[str, Any]
LIKE_PARAMETER, WHOLE = "like its parameter", "whole"


def take(optimizer: Optimizer, names: Names) -> tuple[Record, dict[str, Tensor]]:
    """The record of an optimizer and its tensors. Raises AutoparError for state that can't be saved."""
    groups = [{"names": _names_of(group, names), "options": encode(_options(group), "param_groups")}
              for group in optimizer.param_groups]
    state: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        name = names[id(parameter)]
        state[name] = {key: _kind(value, parameter, f"{name}/{key}") for key, value in values.items()}
        tensors |= {f"{name}/{key}": value.detach() for key, value in values.items() if isinstance(value, Tensor)}
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}, tensors


def joined(record: Record, order: list[str]) -> Record:
    """All ranks' records as one, names in `order`: of a pipeline each has those of its stages. Collective."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, json.dumps(record))
    records = [json.loads(text) for text in said]
    groups = [{**group, "names": sorted({name for each in records for name in each["groups"][i]["names"]},
                                        key=order.index)} for i, group in enumerate(record["groups"])]
    return {**record, "groups": groups, "state": {name: kinds for each in records for name, kinds in
                                                  each["state"].items()}}


def held(record: Record | None, names: Names) -> Record | None:
    """What of a record is of parameters that this rank holds."""
    if record is None:
        return None
    here = set(names.values())
    groups = [{**group, "names": [name for name in group["names"] if name in here]} for group in record["groups"]]
    return {**record, "groups": groups, "state": {name: kinds for name, kinds in record["state"].items()
                                                  if name in here}}


def check(optimizer: Optimizer, names: Names, record: Record | None) -> None:
    """Raises AutoparError unless the record is of an optimizer of this class with these groups."""
    if record is None:
        raise AutoparError("the checkpoint holds no optimizer; load it without one")
    if record["class"] != type(optimizer).__name__:
        raise AutoparError(f"the checkpoint holds the state of {record['class']}, this is {type(optimizer).__name__}; "
                           "use the same optimizer, or load without one")
    mine = [_names_of(group, names) for group in optimizer.param_groups]
    saved = [group["names"] for group in record["groups"]]
    if mine != saved:
        raise AutoparError(f"the optimizer's groups have {[len(g) for g in mine]} parameters, those in the checkpoint "
                           f"{[len(g) for g in saved]}, or others; make the groups as they were when saving")


def targets(optimizer: Optimizer, names: Names, record: Record, table: Table) -> dict[str, Tensor]:
    """Tensors laid out as the present plan has them, for the saved ones to be read into."""
    parameters = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    return {f"{name}/{key}": _target(optimizer, parameters[name], table, (name, key), kind)
            for name, kinds in record["state"].items() for key, kind in kinds.items() if isinstance(kind, str)}


def put_back(optimizer: Optimizer, record: Record, tensors: dict[str, Tensor]) -> None:
    """Give the optimizer the recorded options and state, `tensors` being what was read."""
    place = {name: i for i, name in enumerate(name for group in record["groups"] for name in group["names"])}
    state = {place[name]: {key: tensors[f"{name}/{key}"] if isinstance(kind, str) else decode(kind["value"])
                           for key, kind in kinds.items()} for name, kinds in record["state"].items()}
    groups = [{**decode(group["options"]), "params": [place[name] for name in group["names"]]}
              for group in record["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _names_of(group: dict[str, Any], names: Names) -> list[str]:
    if any(id(p) not in names for p in group["params"]):
        raise AutoparError("the optimizer has parameters that are not the compiled model's; make it from the "
                           "parameters() of what autopar.compile returned")
    return [names[id(p)] for p in group["params"]]


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _kind(value: Any, parameter: Tensor, what: str) -> Any:
    if not isinstance(value, Tensor):
        return {"value": encode(value, what)}
    if not isinstance(value, DTensor):
        return WHOLE
    if value.shape != parameter.shape:
        raise AutoparError(f"optimizer state {what} has shape {list(value.shape)} and its parameter "
                           f"{list(parameter.shape)}; only state of the parameter's shape, or plain tensors that are "
                           "the same on all ranks, can be saved")
    return LIKE_PARAMETER


def _target(optimizer: Optimizer, parameter: Tensor, table: Table, place: tuple[str, str], kind: str) -> Tensor:
    """The tensor that is there already if it fits, else a new one."""
    name, key = place
    saved, held = table.tensors[f"{name}/{key}"], optimizer.state.get(parameter, {}).get(key)
    if isinstance(held, Tensor) and tuple(held.shape) == saved.size and held.dtype == saved.dtype:
        return held.detach()
    if kind == LIKE_PARAMETER:
        return torch.empty_like(parameter.detach(), dtype=saved.dtype)
    return torch.empty(saved.size, dtype=saved.dtype)
