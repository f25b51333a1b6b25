"""Segments as they run on the devices at hand: seconds of every distinct lowered one of a plan, kept on disk.

A file is named by a hash of the lowered program, what comes in, the device, torch and the compiler, so that equal
segments of other models, other depths and later runs are not measured again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from autopar.codegen.arrivals import arrivals
from autopar.codegen.executable import Call, Executable
from autopar.codegen.ranks import together
from autopar.core.errors import AutoparError
from autopar.core.files import entry, read_object, write_whole
from autopar.measure.trial import Trial, trial

FORMAT = "autopar segment 1"
log = logging.getLogger("autopar")
_DEVICE = re.compile(r"device\(type='\w+'(?:, index=\d+)?\)|\b(?:cuda|cpu)(?::\d+)?\b")


def distinct(executable: Executable) -> dict[int, Call]:
    """The first call of each lowered segment, by the identity of that."""
    found: dict[int, Call] = {}
    for call in executable.calls:
        found.setdefault(id(call.lowered), call)
    return found


def variant(call: Call, executable: Executable, around: str) -> str:
    """Sixteen hexadecimal digits that name a lowered segment with what comes in; `around` is all else that tells."""
    lines = [f"{FORMAT} {around} {executable.decision.kept.get(call.segment.name)}"]
    lines += [f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}"
              for node in call.lowered.module.graph.nodes]
    lines += [f"{name} {_described(module)}" for name, module in call.lowered.module.named_children()]
    lines.append(repr(arrivals(call.lowered, executable.decision, executable.target.inputs)))
    text = _DEVICE.sub("device", "\n".join(lines))  # of which each rank has another
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _described(module: nn.Module) -> str:
    plain = {name: value for name, value in vars(module).items()
             if not name.startswith("_") and isinstance(value, int | float | str | tuple | list)}
    inner = {name: _described(child) for name, child in module.named_children()}
    return f"{type(module).__name__} {module.extra_repr()} {plain} {inner}"


def surroundings(device: torch.device, compiler: str) -> str:
    """What tells one place to run from another."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}"
    return f"{name} {dist.get_world_size()} torch {torch.__version__} {compiler}"


def measure(executable: Executable, device: torch.device, known: dict[str, Trial], around: str,
            folder: Path | None) -> dict[int, tuple[str, Trial]]:
    """The variant and the trial of each distinct lowered segment, by its identity; new ones are added to `known`.

    Collective: all ranks run each at the same time, and what the slowest takes counts. Raises AutoparError on all.
    """
    found: dict[int, tuple[str, Trial]] = {}
    calls = distinct(executable)
    for key, call in calls.items():
        name = variant(call, executable, around)
        if name not in known:
            known[name] = _recalled(folder, name) or _together(call, executable, device)
            _keep(folder, name, known[name])
        found[key] = name, known[name]
        log.info("segment %s: %.3f ms forward, %.3f backward, measured (%d of %d)", call.segment.name,
                 1e3 * known[name].forward_s, 1e3 * known[name].backward_s, len(found), len(calls))
    return found


def _together(call: Call, executable: Executable, device: torch.device) -> Trial:
    """One segment on all ranks at once; the worst of each figure."""
    dist.barrier()
    mine = together(lambda: trial(call, executable, device))
    every: list[Trial] = [mine] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return Trial(*(max(column) for column in zip(*map(dataclasses.astuple, every), strict=True)))


def _recalled(folder: Path | None, name: str) -> Trial | None:
    """What rank 0 finds in its folder, on every rank."""
    said: list[Trial | None] = [None]
    if dist.get_rank() == 0 and folder is not None:
        said = [read(folder / f"{name}.json")]
    dist.broadcast_object_list(said)
    return said[0]


def read(path: Path) -> Trial | None:
    """The trial in a file, None where there is none that is whole."""
    if not path.exists():
        return None
    try:
        told = read_object(path)
        if entry(told, "format", str) != FORMAT:
            return None
        return Trial(*(entry(told, f.name, float) for f in dataclasses.fields(Trial)))
    except AutoparError as error:
        log.warning("%s is measured again: %s", path.stem, error)
        return None


def _keep(folder: Path | None, name: str, found: Trial) -> None:
    """On rank 0; a folder that can't be written is told of, and costs only time."""
    if folder is None or dist.get_rank():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{name}.json", json.dumps({"format": FORMAT, **dataclasses.asdict(found)}) + "\n")
    except (AutoparError, OSError) as error:
        log.warning("what was measured of segment %s is not kept: %s", name, error)

