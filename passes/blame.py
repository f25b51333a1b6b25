"""Why a model can't be captured, in one line that names the user's own."""

from __future__ import annotations

import inspect
import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopar.core.errors import AutoparError, CaptureError
from autopar.core.told import some, told

_REMEDIES = [
    ("DataDependent", "make the forward free of control flow that depends on values, or compile the part that is"),
    ("data-dependent", "make the forward free of control flow that depends on values, or compile the part that is"),
    ("torch.nn.utils.weight_nor", "use torch.nn.utils.parametrizations.weight_norm or spectral_norm"),
    ("constant's list", "use no torch.autograd.grad inside of the forward, and write to no .data there"),
    ("deepcopy", "the model holds something that can't be copied: move it out of the module"),
    ("pickle", "the model holds something that can't be copied: move it out of the module"),
    ("Unsupported input type", "give tensors, numbers, strings, and lists, tuples or dicts of them as inputs"),
    ("not a known type", "return tensors, and lists, tuples or dicts of them; where a cache is returned, set "
                         "config.use_cache = False"),
    ("required positional argument", "give the inputs that forward takes, by position or by name"),
    ("required argument", "give the inputs that forward takes, by position or by name"),
    ("positional arguments", "give the inputs that forward takes, by position or by name"),
    ("unexpected keyword argument", "give the inputs that forward takes, by position or by name"),
]
"""What to do about an error, by a word in its name or text."""
_OTHERWISE = "the call fails on inputs of these shapes: mend the forward or the inputs"
_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)')
_MOST_SAID = 200
_APART = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
_LIBRARY = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
Frame = tuple[str, int, str]
"""File, line and function."""


def blame(error: Exception, model: nn.Module) -> str:
    """One line: what failed in an export, where, and what to do about it."""
    frames = [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_tb(error.__traceback__)]
    said = next((line.strip()[:_MOST_SAID] for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    remedy = next((text for words, text in _REMEDIES if words in kind or words in said), _OTHERWISE)
    return f"{type(model).__name__} can't be exported{_where(frames)}: {kind}: {said}; {remedy}"


def check_model(model: Any, loss_fn: Any) -> None:
    """Raises AutoparError unless `model` is a module and `loss_fn` a function or None."""
    if not isinstance(model, nn.Module):
        made = inspect.isclass(model) and issubclass(model, nn.Module)
        found, remedy = (f"the class {model.__name__}", f"; pass an instance, {model.__name__}(...)") if made else (
            told(model), "")
        raise AutoparError(f"model is {found}, needed is a torch.nn.Module{remedy}")
    if isinstance(model, torch.jit.ScriptModule):
        raise AutoparError(f"model is scripted (a {type(model).__name__}), which can't be traced; pass the module that "
                           "it was made of")
    if loss_fn is not None and not callable(loss_fn):
        raise AutoparError(f"loss_fn is {told(loss_fn)}, needed is a function of output and target")
    if isinstance(loss_fn, nn.Module) and next(loss_fn.parameters(), None) is not None:
        raise AutoparError(f"loss_fn has parameters: {some([name for name, _ in loss_fn.named_parameters()])}, which "
                           "would not be trained; make it a part of the model, which then returns its loss")


def check_call(model: Any, inputs: Any, loss_fn: Any) -> None:
    """Raises AutoparError unless `model` can be called with `inputs`, as far as types and shapes tell."""
    check_model(model, loss_fn)
    if not (isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple)
            and isinstance(inputs[1], dict) and all(isinstance(name, str) for name in inputs[1])):
        raise AutoparError(f"inputs are {told(inputs)}, needed is a tuple of positional and a dict of keyword "
                           "arguments, its keys their names")
    if loss_fn is not None and not inputs[0]:
        raise AutoparError(f"loss_fn takes the last positional input as target, but inputs are {list(inputs[1])} by "
                           "keyword only; give inputs as a tuple with the target last")
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if tensors and tensors[0].ndim and not tensors[0].shape[0]:
        raise AutoparError(f"the first input has shape {tuple(tensors[0].shape)}, a batch of 0 samples; give at least "
                           "one")


def check_static(graph: fx.Graph, model: nn.Module) -> None:
    """Raises CaptureError naming the user's line where a shape depends on values, as of `x[x > 0]`."""
    for node in graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
            shape = f"shape ({', '.join(map(str, sizes))})" if isinstance(value, Tensor) else f"value {value}"
            raise CaptureError(f"{type(model).__name__} can't be planned{_where(_stack(node))}: the {shape} of "
                               f"{node.name} depends on the values of tensors, needed is one that their shapes tell; "
                               "use torch.where or a multiplication by the mask")


def here() -> str:
    """Where in the user's code this is called from, as ` at file:line in function`; empty where it is not."""
    stack = [(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in traceback.walk_stack(None)]
    return _where(reversed(stack))


def _stack(node: fx.Node) -> list[Frame]:
    """The frames that made `node`, where the export has kept them."""
    found = _LINE.finditer(node.meta.get("stack_trace") or "")
    return [(match["file"], int(match["line"]), match["name"]) for match in found]


def _where(frames: Iterable[Frame]) -> str:
    """The innermost frame that is the user's, else one of a package besides torch; empty where there is none."""
    outside = [frame for frame in frames if not frame[0].startswith(_APART)]
    packages = [frame for frame in outside if "site-packages" in Path(frame[0]).parts]
    own = [frame for frame in outside if frame not in packages and not frame[0].startswith(_LIBRARY)]
    file, line, name = (own or packages or [("", 0, "")])[-1]
    return f" at {file}:{line} in {name}" if file else ""
