"""Plan files: written whole, read back equal, and refused by name where they are damaged."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autopar.core.errors import AutoparError
from autopar.plan import FORMAT, Plan
from autopar.planned import Bytes, PlannedOp, PlannedParameter, Seconds, Workload

PLAN = Plan(
    "m.py:f", "0" * 12, "cpu:2", "1" * 12, (2, 1), "auto", "fp32", "sgd", "Optimal", 0.0,
    Seconds(0.10, 0.05, 0.03, 0.02, 0.0), Bytes(1.0, 2.0, 3.0, 4.0, 5.0),
    (PlannedOp("conv1", "layer1", ("n", "R"), "S0R = S0R X RR"), PlannedOp("made", "layer1", ("R", "R"), "")),
    (PlannedParameter("conv1.weight", "R,R", "RRRR"),), "causal", ("odd (odd.default)",), 3, 2, 1.5,
    Workload(8, None, 6e9), 1e12)
Path_ = tuple[str | int, ...]
GONE = object()


def changed(path: Path_, value: Any) -> Any:
    """The plan's JSON with `value` at `path`, or without it."""
    data: Any = json.loads(json.dumps(PLAN.to_json()))
    if not path:
        return value
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


def test_saved_and_loaded(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert Plan.load(str(tmp_path / "plan.json")) == PLAN
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_tells_attributes() -> None:
    told = json.loads(json.dumps(PLAN.to_json()))
    rows = {name: [dataclasses.asdict(each) for each in getattr(PLAN, name)] for name in ("ops", "parameters")}
    assert told.pop("format") == FORMAT
    assert all(json.loads(json.dumps(rows.get(name) or getattr(PLAN, name))) == value for name, value in told.items())


@pytest.mark.parametrize(("path", "value", "said"), [
    (("format",), "autopar plan 0", "'format' is 'autopar plan 0', needed is"),
    (("format",), GONE, "'format' is missing"),
    (("gap",), math.nan, "'gap' of plan is nan, needed is a finite number"), (("gap",), "0", "'gap' is '0'"),
    (("step_time_s",), math.nan, "'step_time_s' of plan is nan"), (("step_time_s",), GONE, "'step_time_s' is missing"),
    (("inline_s",), [], "'inline_s' is "), (("memory_bytes", "transient"), math.inf, "transient.*is inf"),
    (("memory_bytes", "gradients"), 10**400, "too large"), (("flop",), -math.inf, "'flop' of plan is -inf"),
    (("memory_bytes",), 3.0, "'memory_bytes' is 3.0"), (("tokens",), GONE, "'tokens' is missing"),
    (("mesh",), [], "'mesh' is .*needed are sizes above 0"), (("mesh",), [0, 2], "'mesh' is .0, 2., needed are sizes"),
    (("mesh",), [-2, -1], "'mesh' is"), (("mesh",), [10**9, 1], "multiply to at most"),
    (("mesh",), [2.0, 1], "mesh.0."),
    (("mesh",), [2], "'assignment' of op conv1 is .'n', 'R'., needed is an entry for each of the 1 axes"),
    (("ops", 0, "assignment"), ["n"], "for each of the 2 axes"), (("ops", 0, "assignment", 0), 3, "is 3, needed is"),
    (("ops", 1, "name"), "conv1", "op conv1 is planned 2 times, needed is once"), (("ops",), {}, "'ops' is"),
    (("ops", 0), "conv1", "ops.0. is 'conv1'"), (("parameters", 0, "storage"), GONE, "'storage' is missing"),
    (("samples",), "8", "'samples' is '8'"), (("nodes",), True, "'nodes' is True"),
    ((), [], "holds a list"), ((), None, "holds a NoneType"), ((), "plan", "holds a str"),
])
def test_damaged_files_are_refused_by_name(path: Path_, value: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(AutoparError, match=said) as refusal:
        Plan.load(file)
    assert str(file) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(("content", "said"), [
    (b"", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"{", "cut short"), (b"[" * 100_000, "lists within lists"),
    (b"\x00" * 9, "is not JSON"), (b"{}", "is not a plan: 'format' is missing"),
])
def test_other_files_are_refused_by_name(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(AutoparError, match=said) as refusal:
        Plan.load(file)
    assert str(file) in str(refusal.value)


def test_every_prefix_of_a_file_is_refused(tmp_path: Path) -> None:
    text, file = json.dumps(PLAN.to_json()), tmp_path / "plan.json"
    for length in range(len(text)):
        file.write_text(text[:length])
        with pytest.raises(AutoparError, match=r"plan\.json"):
            Plan.load(file)


def places(data: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every place in a JSON value."""
    yield path
    for step in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield from places(data[step], (*path, step))


@pytest.mark.parametrize("value", [GONE, None, 0, -1, 1.5, math.nan, math.inf, "", "x", [], {}, True, [4], ["R"]])
def test_any_change_is_read_or_refused(value: Any) -> None:
    for path in places(PLAN.to_json()):
        if path or value is not GONE:
            try:
                str(Plan.from_json(changed(path, value)))
            except AutoparError as refusal:
                assert "\n" not in str(refusal)


@pytest.mark.parametrize("path", [3, None, b"plan.json", ["plan.json"], {}, ""])
def test_paths_of_no_file(path: Any) -> None:
    for use in (Plan.load, PLAN.save):
        with pytest.raises(AutoparError, match=r"the path of a plan is .*, needed is a path"):
            use(path)


def test_places_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "plan.json"):
        with pytest.raises(AutoparError, match="cannot read"):
            Plan.load(path)
        with pytest.raises(AutoparError, match="cannot write"):
            PLAN.save(path)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_checked_when_it_is_made() -> None:
    with pytest.raises(AutoparError, match="'mesh' is"):
        dataclasses.replace(PLAN, mesh=(0,))
