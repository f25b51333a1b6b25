"""What names a measured segment: the same on every rank, another for anything that changes what runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from autopar.codegen.executable import Executable, build, offline
from autopar.codegen.lower import Target
from autopar.core.mesh import Mesh
from autopar.measure.segments import distinct, read, variant
from autopar.planner import Request, decision_of, solve
from tests.builders import quick
from tests.programs import model_context


@cache
def executable(mode: str, device: str, precision: str = "fp32") -> Executable:
    context, where = model_context("gpt2", precision), quick(2)  # type: ignore[arg-type]
    decision = decision_of(solve(context, where, Request("gpt2", mode, (2,), solver="highs"))[0], context)
    return build(Target(decision, offline(Mesh((2,))), where.pricer(Mesh((2,))), torch.device(device), sums="outside"))


def names(made: Executable, around: str = "here") -> list[str]:
    return [variant(call, made, around) for call in distinct(made).values()]


def test_ranks_have_one_name() -> None:
    assert names(executable("ddp", "cuda:0")) == names(executable("ddp", "cuda:1"))


@pytest.mark.parametrize("other", [("1d", "cuda:0"), ("ddp", "cuda:0", "bf16")])
def test_other_programs_have_others(other: tuple[str, ...]) -> None:
    block = names(executable("ddp", "cuda:0"))[1]
    assert block not in names(executable(*other))
    assert block != names(executable("ddp", "cuda:0"), "elsewhere")[1]


@pytest.mark.parametrize("text", ["", "{", "{}", '{"format": "autopar segment 1"}', '{"format": "another"}'])
def test_files_that_are_none_are_as_if_not_there(text: str, tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    assert read(path) is None
    path.write_text(text)
    assert read(path) is None
