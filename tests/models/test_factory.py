"""The user's own models: what a factory is called with, may return, and the line that is named when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.core.errors import AutoparError
from autopar.models.built import BuiltModel
from autopar.models.catalog import DEFAULT_BATCH
from autopar.models.factory import build_own

PRELUDE = """\
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width)
    def forward(self, x):
        return self.layer(x).sum()

class Words(nn.Module):
    def __init__(self, longest=None):
        super().__init__()
        if longest:
            self.config = type("Config", (), {"max_position_embeddings": longest})
    def forward(self, input_ids, labels):
        return labels.sum()

"""
FIRST = PRELUDE.count("\n") + 1


@pytest.fixture
def own(tmp_path: Path) -> Any:
    """`own(source, batch, seq)` builds `f` of a file of PRELUDE and `source`."""
    def build(source: str, batch: int | None = None, seq: int | None = None) -> BuiltModel:
        path = tmp_path / "mine.py"
        path.write_text(PRELUDE + source)
        return build_own(f"{path}:f", batch, seq)
    return build


def shapes(built: BuiltModel) -> list[tuple[int, ...]]:
    args, kwargs = built.call
    return [tuple(tensor.shape) for tensor in (*args, *kwargs.values())]


@pytest.mark.parametrize(("source", "batch", "seq", "wanted"), [
    ("def f(): return Net(), torch.zeros(6, 4)", None, None, [(6, 4)]),
    ("def f(): return Net(), [torch.zeros(6, 4)]", None, None, [(6, 4)]),
    ("def f(): return Net(), {'x': torch.zeros(6, 4)}", None, None, [(6, 4)]),
    ("def f(batch): return Net(), torch.zeros(batch, 4)", None, None, [(DEFAULT_BATCH, 4)]),
    ("def f(batch): return Net(), torch.zeros(batch, 4)", 3, None, [(3, 4)]),
    ("def f(batch=5): return Net(), torch.zeros(batch, 4)", None, None, [(5, 4)]),
    ("def f(batch=5): return Net(), torch.zeros(batch, 4)", 3, None, [(3, 4)]),
    ("def f(*, seq, batch=5): return Net(seq), torch.zeros(batch, seq)", None, 7, [(5, 7)]),
    ("def f(**sizes): return Net(), torch.zeros(sizes.get('batch', 9), 4)", None, None, [(9, 4)]),
    ("def f(**sizes): return Net(), torch.zeros(sizes.get('batch', 9), 4)", 3, None, [(3, 4)]),
    ("def f(): return Net(), (torch.zeros(6, 4), torch.zeros(6)), lambda out, target: out", None, None, [(6, 4), (6,)]),
    ("def f(): return Words()", 3, 7, [(3, 7), (3, 7)]),
    ("def f(): return Words(11)", None, None, [(DEFAULT_BATCH, 11)] * 2),
    ("f = Words", 3, 7, [(3, 7), (3, 7)]),
])
def test_called_with_what_it_takes(own: Any, source: str, batch: int | None, seq: int | None,
                                   wanted: list[tuple[int, ...]]) -> None:
    built = own(source, batch, seq)
    assert shapes(built) == wanted
    assert built.model.training and (built.loss_fn is not None) == ("lambda" in source)


def test_model_is_left_where_it_was_made(own: Any) -> None:
    assert own("def f(): return Net(), torch.zeros(6, 4)").model.layer.weight.device.type == "cpu"
    source = "def f():\n    with torch.device('meta'): return Net().eval(), torch.zeros(6, 4)"
    built = own(source)
    assert built.model.layer.weight.device.type == "meta" and built.model.training


def test_files_beside_it_can_be_imported(own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    (tmp_path / "beside_mine.py").write_text("import torch\nsize = 12\n")
    built = own("from beside_mine import size\ndef f(): return Net(), torch.zeros(size, 4)")
    assert shapes(built) == [(12, 4)]


@pytest.mark.parametrize(("source", "line", "said"), [
    ("def f():\n    raise ValueError('width is 3')", 1, "f raised at {}: ValueError: width is 3"),
    ("def f():\n    raise ValueError('one\\ntwo')", 1, "f raised at {}: ValueError: one; it has to return"),
    ("def f():\n    raise SystemExit(3)", 1, "f raised at {}: SystemExit: 3"),
    ("def g():\n    return torch.zeros(2) @ torch.zeros(3)\ndef f(): return g()", 1, "f raised at {}: RuntimeError"),
    ("def f(config): return Net()", 0, "missing 1 required positional argument: 'config'"),
    ("def f(): return 5", 0, "f at {} returned int; needed is a module, (module, inputs)"),
    ("\ndef f(): return ()", 1, "f at {} returned (); needed is a module"),
    ("def f(): return Net(), 1, 2, 3", 0, "f at {} returned (Net, int, int, int); needed is"),
    ("def f(): return torch.zeros(2), Net()", 0, "f at {} returned (Tensor, Net); needed is"),
    ("def f(): return Net(), 5", 0, "f at {} returned inputs of type int; needed is a tensor"),
    ("def f(): return Net(), {1: 2}", 0, "f at {} returned inputs of type dict; needed is a tensor"),
    ("def f(): return Net(), torch.zeros(2), 5", 0, "f at {} returned a loss_fn of type int"),
    ("def f(): return Net()", 0, "f at {} returned only a module, whose forward takes x; return (module, inputs)"),
    ("def f(): return Words()", 0, "f at {} returned only a module, and nothing says how many tokens"),
    ("f = 3", None, "has 'f', but of type int; needed is a function or class, found are Net, Words"),
    ("g = 3", None, "has no 'f'; needed is a function or class, found are Net, Words"),
    ("import no_such_module_here", 0, "raised at {}: ModuleNotFoundError: No module named 'no_such_module_here'"),
    ("def f(:", 0, "raised at {}: SyntaxError"),
    ("raise SystemExit", 0, "raised at {}: SystemExit; correct it"),
])
def test_failures_name_the_line(own: Any, tmp_path: Path, source: str, line: int | None, said: str) -> None:
    with pytest.raises(AutoparError) as refusal:
        own(source)
    where = f"{tmp_path / 'mine.py'}:{FIRST + line}" if line is not None else ""
    assert where in str(refusal.value)
    assert said.replace("{}", where) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("asked", "said"), [
    ({"batch": 3}, "takes no batch, so its own inputs decide; leave --batch out"),
    ({"seq": 3}, "takes no seq, so its own inputs decide; leave --seq out"),
    ({"batch": 3, "seq": 3}, "takes no batch and no seq, so its own inputs decide; leave --batch and --seq out"),
])
def test_a_size_it_does_not_take_is_not_ignored(own: Any, asked: dict[str, int], said: str) -> None:
    with pytest.raises(AutoparError, match=said):
        own("def f(): return Net(), torch.zeros(6, 4)", **asked)


@pytest.mark.parametrize("reference", ["mine.py", "mine.py:", ":f", "mine.py:f()", "mine.py:a.b", "mine.py:2"])
def test_no_reference_is_refused(reference: str) -> None:
    with pytest.raises(AutoparError, match=r"not of the form path/to/file\.py:factory"):
        build_own(reference, None, None)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AutoparError, match="there is no such file"):
        build_own(f"{tmp_path}/none.py:f", None, None)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("def f(): ...")
    with pytest.raises(AutoparError, match="is not Python"):
        build_own(f"{tmp_path}/model.txt:f", None, None)


def test_two_files_of_one_name_are_two(tmp_path: Path) -> None:
    for place, width in (("a", 4), ("b", 8)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mine.py").write_text(PRELUDE + f"def f(): return Net({width}), torch.zeros(2, {width})")
    made = [shapes(build_own(f"{tmp_path / place / 'mine.py'}:f", None, None)) for place in "ab"]
    assert made == [[(2, 4)], [(2, 8)]]


def test_values_of_inputs_are_kept(own: Any) -> None:
    assert torch.equal(own("def f(): return Net(), torch.ones(6, 4)").inputs[0], torch.ones(6, 4))
