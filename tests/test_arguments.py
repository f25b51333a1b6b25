"""What users pass: every form that is meant is read, everything else refused with what was found and what is needed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autopar.arguments import one_of, read_budget, read_cluster, read_mesh, read_pins, read_plan
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from tests.test_plan import PLAN


@pytest.mark.parametrize(("given", "shape"), [
    ("4x2", (4, 2)), ("4X2", (4, 2)), (" 4 x 2 ", (4, 2)), ("4,2", (4, 2)), ("8", (8,)), (8, (8,)), ((4, 2), (4, 2)),
    ([4, 2], (4, 2)), (torch.Size([4, 2]), (4, 2)), ((np.int64(4), 2), (4, 2)), ("2x2x2x2", (2, 2, 2, 2)),
    ("1x4", (1, 4)), ("16384", (16384,)),
])
def test_meshes(given: Any, shape: tuple[int, ...]) -> None:
    found = read_mesh(given)
    assert found == shape and all(type(size) is int for size in found)


@pytest.mark.parametrize("given", [
    "", "x", "4by2", "4x", "-4", "4.0", "0", "4x0", "\u00bd", "9" * 5000, "99999999999x1", "16385", 0, -4, 4.0, True,
    math.nan, (), (0,), (-4,), (4.0,), ("4",), (True, 4), ((4,),), {}, {4, 2}, b"4", object(),
    (999_999_999_999, 1), (2,) * 40, 10**400,
])
def test_no_meshes(given: Any) -> None:
    with pytest.raises(AutoparError, match=r"^mesh ") as refusal:
        read_mesh(given)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 6000


@pytest.mark.parametrize(("given", "nbytes"), [
    ("20GiB", 20 * 2**30), ("1 GB", 1e9), ("1e9", 1e9), (1, 1.0), (1e9, 1e9), (np.float32(2.0), 2.0), (10**18, 1e18),
])
def test_budgets(given: Any, nbytes: float) -> None:
    found = read_budget(given)
    assert found == nbytes and type(found) is float


@pytest.mark.parametrize("given", [
    "", "lots", "nan", "inf", "-1GiB", "0", "1e999", "1e30GiB", "20 XiB", "GiB", 0, -1, 0.0, math.nan, math.inf,
    -math.inf, 10**400, True, (1,), {}, b"1GB", torch.tensor(1e9), 1j,
])
def test_no_budgets(given: Any) -> None:
    with pytest.raises(AutoparError, match=r"^memory .*20GiB") as refusal:
        read_budget(given)
    assert "\n" not in str(refusal.value)


def test_clusters(tmp_path: Path) -> None:
    cluster = Cluster.preset("2x4xH100")
    cluster.save(tmp_path / "cluster.json")
    cluster.save(tmp_path / "cluster")
    files = [tmp_path / "cluster.json", str(tmp_path / "cluster.json"), tmp_path / "cluster", str(tmp_path / "cluster")]
    assert all(read_cluster(each) == cluster for each in (cluster, "2x4xH100", *files))


@pytest.mark.parametrize(("given", "said"), [
    (3, "cluster is 3, of type int, needed is a Cluster, the text of a preset"), (None, "cluster is None"),
    (b"cpu:4", "cluster is b'cpu:4', of type bytes"), (["cpu:4"], "of type list"), (4.5, "of type float"),
    ("", "cluster '' is not of the form"), ("many", "is not of the form"), ("8xB200", "unknown device type 'B200'"),
    ("none.json", "cannot read none.json"), (Path("none"), "cannot read none"), ("a/b", "cannot read a/b"),
    (".", "is not of the form"), ("./", "cannot read ./"), ("a\x00b", "is not of the form"),
    ("x" * 5000, "is not of the form"), ("8\u00d7A100-80GB", "is not of the form"),
    ("cpu:99999", "the most that can be planned for"),
])
def test_no_clusters(given: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AutoparError, match=said) as refusal:
        read_cluster(given)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_plans(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert read_plan(PLAN) is PLAN
    assert read_plan(str(tmp_path / "plan.json")) == read_plan(tmp_path / "plan.json") == PLAN


@pytest.mark.parametrize(("given", "said"), [
    (3, "plan is 3, of type int, needed is a Plan, or the path"), ({}, "of type dict"), (b"p", "of type bytes"),
    ("", "the path of a plan is ''"), ("none.json", "cannot read none.json"), (Path(), "cannot read ."),
])
def test_no_plans(given: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AutoparError, match=said):
        read_plan(given)


def test_pins() -> None:
    assert read_pins({}) == ()
    assert read_pins({"up": "RR", "down": "S0R"}) == (("up", "RR"), ("down", "S0R"))


@pytest.mark.parametrize(("given", "said"), [
    (3, "pins are 3, of type int, needed is a dict"), ("up=RR", "pins are 'up=RR'"), ([("up", "RR")], "of type list"),
    ({"up": 3}, "pin 'up', of type str: 3, of type int, needed are two texts"), ({3: "RR"}, "pin 3, of type int"),
])
def test_no_pins(given: Any, said: str) -> None:
    with pytest.raises(AutoparError, match=said):
        read_pins(given)


@pytest.mark.parametrize(("given", "said"), [
    ("b", "unknown word 'b'; known: a, c"), (3, "word is 3, of type int, needed is one of a, c"),
    (None, "word is None"), (["a"], "of type list"), (torch.tensor(1), "of type Tensor"),
    (np.zeros(3), "of type ndarray"),
])
def test_words(given: Any, said: str) -> None:
    assert one_of("word", "a", ["a", "c"]) == "a"
    with pytest.raises(AutoparError, match=said):
        one_of("word", given, ["a", "c"])
