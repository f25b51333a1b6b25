"""What is written: each class once, nothing that a linter minds, constants to the bit, alike each time."""

from __future__ import annotations

import ast
import inspect
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.api import arguments
from autopar.codegen import substitute, vocabulary
from autopar.codegen.source.constants import constant_text, unpacked
from autopar.codegen.source.ops import MODULES, Text, literal, op_text
from autopar.codegen.source.runs import repeated, runs_of
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.passes.capture import capture
from autopar.passes.decision import Context
from autopar.plan import Plan
from autopar.planner import Request, prepare, solve
from tests.builders import Case, gpt2, mlp, quick, resnet

aten = torch.ops.aten
RUFF = Path(__file__).parents[3] / ".venv/bin/ruff"


def planned(case: Case, mode: str, ranks: int = 2) -> tuple[Plan, Context, Cluster]:
    context = prepare(capture(case.model, arguments(case.inputs), "fp32", case.loss_fn))
    plan, _ = solve(context, quick(ranks), Request("tiny", mode, solver="highs"))
    return plan, context, quick(ranks)


def text_of(case: Case, mode: str, folder: Path) -> str:
    plan, context, cluster = planned(case, mode)
    plan.emit(folder / "step.py", context, cluster)
    return (folder / "step.py").read_text()


@pytest.mark.parametrize(("case", "mode"), [(gpt2(dropout=0.1), "sequence"), (resnet(size=32), "zero3")])
def test_nothing_that_a_linter_minds(tmp_path: Path, case: Case, mode: str) -> None:
    text = text_of(case, mode, tmp_path)
    checked = subprocess.run(["ruff" if not RUFF.exists() else RUFF, "check", "--isolated", "--select", "E4,E7,E9,F,I",
                              tmp_path / "step.py"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert max(map(len, text.splitlines())) <= 120


def test_layers_that_are_alike_are_written_once(tmp_path: Path) -> None:
    few, many = (text_of(gpt2(layers=layers), "zero3", tmp_path) for layers in (2, 5))
    assert len(few.splitlines()) == len(many.splitlines())
    names = [node.name for node in ast.parse(many).body if isinstance(node, ast.FunctionDef)]
    assert names == ["between_0", "transformer_h", "between_6", "constants", "step", "main"]
    assert 'range(5), {\n        "ln_1.weight"' in many and "for i in range(5):" in many


def test_it_tells_model_mesh_plan_and_how_to_run_it(tmp_path: Path) -> None:
    plan, context, cluster = planned(mlp(), "1d")
    plan.emit(tmp_path / "my_step.py", context, cluster)
    said = ast.get_docstring(ast.parse((tmp_path / "my_step.py").read_text())) or ""
    for words in ("tiny", "mesh 2", "mode 1d", plan.program_key, plan.cluster_key,
                  "torchrun --nproc-per-node 2 my_step.py"):
        assert words in said


def test_the_same_plan_is_written_alike(tmp_path: Path) -> None:
    plan, context, cluster = planned(gpt2(dropout=0.1), "sequence")
    texts = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        plan.emit(folder / "step.py", context, cluster)
        texts.append((folder / "step.py").read_text())
    assert texts[0] == texts[1]


def test_every_module_that_stands_in_for_an_op_can_be_written() -> None:
    made = {found for module in (substitute, vocabulary) for found in vars(module).values()
            if inspect.isclass(found) and issubclass(found, nn.Module) and found.__module__ == module.__name__}
    assert made <= set(MODULES)


CONSTANTS = [torch.zeros(3, 4), torch.tensor(2.5), torch.arange(6).reshape(1, 6), torch.arange(4.0), torch.rand(50, 3),
             torch.rand(40).bfloat16(), torch.ones(5, 5, dtype=torch.bool).tril(), torch.tensor([False, True]),
             torch.tensor([0.0, -0.0]), torch.full((2,), -math.inf), torch.empty(0, 3), torch.randint(9, (7, 9)),
             torch.arange(12).reshape(3, 4).t(), torch.tensor([1 + 2j])]


@pytest.mark.parametrize("value", CONSTANTS, ids=lambda x: f"{x.dtype}{list(x.shape)}")
def test_constants_to_the_bit(value: Tensor) -> None:
    scope = {"torch": torch, "unpacked": unpacked, "rank": SimpleNamespace(device=torch.device("cpu"))}
    made: Any = eval(str(constant_text(value)), scope)
    assert made.dtype == value.dtype and made.shape == value.shape
    assert made.contiguous().reshape(-1).view(torch.uint8).tolist() == (
        value.contiguous().reshape(-1).view(torch.uint8).tolist())


X = torch.arange(24.0).reshape(2, 3, 4)
CALLS = [(aten.slice.Tensor, (1, 1, 2**63 - 1)), (aten.slice.Tensor, (-1, 0, -1)), (aten.slice.Tensor, (-2, 1)),
         (aten.slice.Tensor, (2, 0, 4, 2)), (aten.reshape.default, ([6, 4],)), (aten.reshape.default, ([-1],)),
         (aten.permute.default, ([2, 0, 1],)), (aten.transpose.int, (-1, 0)), (aten.mul.Tensor, (-2,)),
         (aten.pow.Tensor_Scalar, (2,)), (aten.neg.default, ()), (aten.mean.dim, ([1], True)),
         (aten.to.dtype, (torch.int32,)), (aten.expand.default, ([5, 2, 3, 4],)),
         (aten.clamp.default, (-math.inf, 3.0)), (aten.sum.dim_IntList, ([-1],))]


@pytest.mark.parametrize(("op", "args"), CALLS, ids=str)
def test_calls_do_what_the_op_does(op: Any, args: tuple[Any, ...]) -> None:
    text = op_text(op, (Text("x"), *args), {})
    found = eval(str(text), {"x": X, "torch": torch, "aten": aten, "float": float})
    expected = op(X, *args)
    assert torch.equal(found, expected) and found.dtype == expected.dtype


def test_operators_bind_as_they_are_nested() -> None:
    inner = op_text(aten.add.Tensor, (Text("x"), -1), {})
    assert str(op_text(aten.mul.Tensor, (inner, inner), {})) == "(x + (-1)) * (x + (-1))"
    assert str(op_text(aten.reshape.default, (inner, [24]), {})) == "(x + (-1)).reshape(24)"


def test_what_has_no_form_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="can't be written"):
        literal(object())


def test_blocks_that_are_alike_are_repeated() -> None:
    table = {"wte": 1, "h.0.a": 2, "h.0.b": 3, "h.1.a": 2, "h.1.b": 3, "h.2.a": 2, "ln.w": 5, "h.3.a": 2, "0.w": 1}
    runs = runs_of(table)
    assert [(run.path, run.numbers) for run in runs if len(run.numbers) > 1] == [
        ("h.{}", range(2)), ("h.{}", range(2, 4))]
    found: dict[str, int] = {}
    for run in runs:
        found |= repeated(run.path, run.numbers, run.rows) if len(run.numbers) > 1 else run.rows
    assert found == table


def test_refused_for_another_model_or_cluster(tmp_path: Path) -> None:
    plan, context, cluster = planned(mlp(), "1d")
    path = tmp_path / "step.py"
    path.write_text("as it was")
    with pytest.raises(AutoparError, match="the plan is for program"):
        plan.emit(path, planned(mlp(batch=4), "1d")[1], cluster)
    with pytest.raises(AutoparError, match="the plan is for cluster"):
        plan.emit(path, context, quick(4))
    assert path.read_text() == "as it was" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("path", "said"), [
    ("nowhere/step.py", "cannot write"), ("", "cannot write"), (7, "is 7, of type int")])
def test_refused_where_it_cannot_be_written(tmp_path: Path, path: Any, said: str) -> None:
    plan, context, cluster = planned(mlp(), "1d")
    with pytest.raises(AutoparError, match=said):
        plan.emit(tmp_path / path if isinstance(path, str) else path, context, cluster)
    assert not list(tmp_path.iterdir())
