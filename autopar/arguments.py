"""What users ask for, by call or by command line, read as what it stands for or refused. Nothing here imports torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError, UnknownName
from autopar.core.mesh import parse_mesh
from autopar.core.presets import MOST_DEVICES
from autopar.core.ranks import HandLayout
from autopar.core.told import told
from autopar.core.units import parse_bytes
from autopar.plan import Plan

ClusterLike = Cluster | str | os.PathLike[str]
MOST_BYTES = 1e18
"""The largest budget of a device, in bytes: beyond it a number is no amount of memory."""
_DIGITS = 9


def read_cluster(given: Any) -> Cluster:
    """A cluster as it is, from the JSON file of that name, else the preset of that text. Raises AutoparError."""
    if isinstance(given, Cluster):
        return given
    if isinstance(given, str) and not _is_file(given):
        return Cluster.preset(given)
    if isinstance(given, str | os.PathLike):
        return Cluster.load(given)
    raise AutoparError(f"cluster is {told(given)}, needed is a Cluster, the text of a preset such as '8xA100-80GB', or "
                       "the path of a cluster file")


def read_plan(given: Any) -> Plan:
    """A plan as it is, or from the file of that name. Raises AutoparError."""
    if isinstance(given, Plan):
        return given
    if isinstance(given, str | os.PathLike):
        return Plan.load(given)
    raise AutoparError(f"plan is {told(given)}, needed is a Plan, or the path of one that was saved")


def read_mesh(given: Any) -> tuple[int, ...]:
    """The sizes of axes in `4x2`, (4, 2), or 8 for a single axis. Raises AutoparError for anything else."""
    if isinstance(given, str):
        sizes = [int(digits[:_DIGITS]) for digits in re.findall("[0-9]+", given)]
        _check_sizes(given, sizes)
        return parse_mesh(given).shape
    sizes = list(given) if isinstance(given, Sequence) and not isinstance(given, bytes) else [given]
    if not sizes or not all(_is(size, Integral) and size > 0 for size in sizes):
        raise AutoparError(f"mesh is {told(given)}, needed are sizes above 0, such as (4, 2) or '4x2'")
    _check_sizes(given, sizes)
    return tuple(int(size) for size in sizes)


def read_counts(counts: tuple[Any, Any, Any, Any],
                mesh: tuple[int, ...] | None) -> tuple[int | None, tuple[int, ...] | None, int | None]:
    """Stages, the mesh of a stage and micro-batches, of which None are to be found, from `counts`: pp, dp, tp and
    micro_batches. Raises AutoparError."""
    pp, dp, tp, micro_batches = counts
    for name, value in zip(("pp", "dp", "tp", "micro_batches"), counts, strict=True):
        if value is not None and not (_is(value, Integral) and value > 0):
            raise AutoparError(f"{name} is {told(value)}, needed is a whole number above 0")
    if mesh is not None and (dp or tp):
        raise AutoparError(f"mesh is {'x'.join(map(str, mesh))}, and dp or tp is given too, which are a mesh; give one "
                           "of them")
    inner = mesh if dp is None and tp is None else (int(dp or 1), int(tp)) if tp else (int(dp),)
    return None if pp is None else int(pp), inner, None if micro_batches is None else int(micro_batches)


def read_layout(ppranks: Any, dpranks: Any) -> HandLayout | None:
    """The layout given by hand, None without one. Raises AutoparError unless both are lists of lists of ranks."""
    if ppranks is None and dpranks is None:
        return None
    if ppranks is None:
        raise AutoparError(f"dpranks are {told(dpranks)}, and there are no ppranks, which tell the order of stages; "
                           "give both, or ppranks alone")
    for name, given in (("ppranks", ppranks), ("dpranks", () if dpranks is None else dpranks)):
        if not (_is_list(given) and all(_is_list(each) and each for each in given)
                and all(_is(rank, Integral) for each in given for rank in each) and (given or name == "dpranks")):
            raise AutoparError(f"{name} are {told(given)}, needed are lists of ranks, such as [[0, 1], [2, 3]]")
    columns, groups = (tuple(tuple(map(int, each)) for each in given or ()) for given in (ppranks, dpranks))
    return HandLayout(columns, groups)


def read_budget(given: Any) -> float:
    """Bytes, from a number of them or a text such as 20GiB. Raises AutoparError for anything else."""
    amount: Any = parse_bytes(given) if isinstance(given, str) else given
    if _is(amount, Real) and 0 < amount <= MOST_BYTES:
        return float(amount)
    raise AutoparError(f"memory budget is {told(given)}, needed are bytes above 0 and at most {MOST_BYTES:g}, as a "
                       "number or a text such as '20GiB'")


def read_pins(given: Any) -> tuple[tuple[str, str], ...]:
    """Pairs of an op's name and its strategy. Raises AutoparError unless both are texts."""
    if not isinstance(given, Mapping):
        raise AutoparError(f"pins are {told(given)}, needed is a dict of strategies by op, such as "
                           "{'h_0_attn_c_attn': 'S0R = S0R X RR'}")
    for name, strategy in given.items():
        if not (isinstance(name, str) and isinstance(strategy, str)):
            raise AutoparError(f"pin {told(name)}: {told(strategy)}, needed are two texts, the name of an op and its "
                               "strategy as a plan prints them")
    return tuple(given.items())


def one_of(what: str, given: Any, known: Iterable[str]) -> str:
    """`given`, if it is one of the names that are known. Raises AutoparError."""
    names = list(known)
    if not isinstance(given, str):
        raise AutoparError(f"{what} is {told(given)}, needed is one of {', '.join(names)}")
    if given not in names:
        raise UnknownName(what, given, names)
    return given


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is(value: Any, kind: type) -> bool:
    """Whether `value` is such a number; a bool is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_file(text: str) -> bool:
    try:
        return text.endswith(".json") or "/" in text or Path(text).is_file()
    except (OSError, ValueError):  # no name of a file: too long, or with characters that none has
        return False


def _check_sizes(given: object, sizes: Sequence[int]) -> None:
    if math.prod(sizes) > MOST_DEVICES:
        raise AutoparError(f"mesh is {told(given)}, of more devices than can be planned for, which are {MOST_DEVICES}; "
                           "choose sizes that multiply to the number of devices")
