"""What is said of models that can't be captured: one line, the user's own line named."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.core.errors import AutoparError, CaptureError
from autopar.passes.capture import capture, keep_loss

X, Y = torch.ones(8, 4), torch.zeros(8, dtype=torch.long)


class Net(nn.Module):
    """Four in, three out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


class Masked(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.layer(x)
        return h[h > 0].sum()


class Places(Net):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x).nonzero().sum()


class Branch(Net):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x).sum() if x.sum() > 0 else x.sum()


class Repeat(Net):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x).repeat_interleave(x[:, 0].long(), dim=0).sum()


class Item(Net):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x).sum() * x.max().item()


class Wrong(Net):
    def forward(self, x: Tensor) -> Any:
        return (self.layer(x) @ x).sum()


class Raises(Net):
    def forward(self, x: Tensor) -> Any:
        raise KeyError("one\ntwo")


class Text(Net):
    def forward(self, x: Tensor) -> Any:
        return "loss"


class Cache:
    """What export does not know."""


class Cached(Net):
    def forward(self, x: Tensor) -> Any:
        return {"loss": self.layer(x).sum(), "cache": Cache()}


class Constant(Net):
    def forward(self, x: Tensor) -> Any:
        return torch.zeros(())


def last_line(model: type[nn.Module]) -> int:
    """Where the forward of `model` ends."""
    lines, first = inspect.getsourcelines(model.forward)
    return first + len(lines) - 1


@pytest.mark.parametrize(("model", "words"), [
    (Masked, "depends on the values of tensors"), (Places, "depends on the values of tensors"),
    (Repeat, "depends on the values of tensors"), (Item, "depends on the values of tensors"),
    (Branch, "free of control flow that depends on values"), (Wrong, "RuntimeError: .*; the call fails"),
    (Raises, "KeyError: .*; the call fails"),
])
def test_the_user_s_line_is_named(model: type[nn.Module], words: str) -> None:
    with pytest.raises(CaptureError, match=words) as refusal:
        capture(model(), ((X,), {}))
    assert f" at {__file__}:{last_line(model)} in forward: " in str(refusal.value)
    assert str(refusal.value).startswith(f"{model.__name__} can't be ") and "\n" not in str(refusal.value)


Call = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.mark.parametrize(("call", "loss_fn", "said"), [
    (((X, Y), {}), 3, "loss_fn is 3, of type int, needed is a function of output and target"),
    (((X, Y), {}), "mse", "loss_fn is 'mse', of type str, needed is a function"),
    (((), {"x": X}), F.cross_entropy, r"target, but inputs are \['x'\] by keyword only; give inputs as a tuple"),
    (((), {}), F.cross_entropy, r"inputs are \[\] by keyword only"),
    (((X[:0], Y[:0]), {}), F.cross_entropy, r"the first input has shape \(0, 4\), a batch of 0 samples"),
    (X, None, "inputs are tensor.* needed is a tuple of positional and a dict of keyword"),
    ((X, Y), None, "needed is a tuple of positional and a dict of keyword"),
    (((X,), {1: X}), None, "its keys their names"),
    (((), {}), None, "argument: 'x'; give the inputs that forward takes"),
    (((X, Y), {}), None, "positional arguments; give the inputs that forward takes"),
    (((), {"y": X}), None, "argument: 'x'; give the inputs that forward takes"),
    (((object(),), {}), None, "give tensors, numbers, strings"),
    (((X, Y[:4]), {}), F.cross_entropy, "batch_size .*8.* batch_size .*4"),
    (((X, Y), {}), lambda output: output, "1 positional argument but 2 were given"),
])
def test_calls_that_do_not_fit(call: Call, loss_fn: Any, said: str) -> None:
    with pytest.raises(AutoparError, match=said) as refusal:
        capture(Net(), call, "fp32", loss_fn)
    assert "\n" not in str(refusal.value) and "inspect.py" not in str(refusal.value)


@pytest.mark.parametrize(("model", "said"), [
    (None, "model is None, of type NoneType, needed is a torch.nn.Module"),
    (Net, r"model is the class Net, needed is a torch.nn.Module; pass an instance, Net\(...\)"),
    ("gpt2", "model is 'gpt2', of type str, needed"), (int, "of type type, needed"), ({}, "model is {}, of type dict"),
])
def test_what_is_no_model(model: Any, said: str) -> None:
    with pytest.raises(AutoparError, match=said):
        capture(model, ((X,), {}))


@pytest.mark.parametrize(("model", "loss_fn", "said"), [
    (Net(), None, r"outputs have shapes \(8, 3\) and none is a scalar loss; pass the labels"),
    (Text(), None, r"the model returns \['loss'\], no tensor, and none is a scalar loss"),
    (Constant(), None, "depends on no parameter and no input"),
    (Net(), lambda output, target: None, r"returns \[None\], no tensor"),
    (Net(), lambda output, target: 3.0, r"returns \[3.0\], no tensor"),
    (Net(), lambda output, target: output, "give a loss_fn= that returns a scalar"),
])
def test_what_is_no_loss(model: nn.Module, loss_fn: Any, said: str) -> None:
    with pytest.raises(AutoparError, match=said):
        keep_loss(capture(model, ((X, Y) if loss_fn else (X,), {}), "fp32", loss_fn))


def test_outputs_that_export_does_not_know() -> None:
    with pytest.raises(CaptureError, match=r"not a known type.*; return tensors, .* set config\.use_cache = False"):
        capture(Cached(), ((X,), {}))


@pytest.mark.parametrize("precision", ["fp8", None, 3, ["fp32"], torch.bfloat16])
def test_unknown_precisions(precision: Any) -> None:
    with pytest.raises(AutoparError, match="is not one of fp32, bf16, bf16-mixed, fp16-mixed"):
        capture(Net(), ((X,), {}), precision)
