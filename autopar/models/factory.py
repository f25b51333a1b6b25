"""The user's own model, from `path/to/file.py:factory`.

`factory` is a function or class of that file. It is called without arguments but these, by keyword, where its signature
has them: `batch`, samples of the global batch, and `seq`, tokens a sample. What was not asked for is left to its own
defaults; a `batch` without one gets DEFAULT_BATCH. It returns one of

    module                      whose forward takes input_ids and labels and returns its loss
    (module, inputs)            which returns its loss
    (module, inputs, loss_fn)   whose output `loss_fn(output, target)` makes a loss of, the target the last input

with `inputs` a tensor, a tuple of positional or a dict of keyword arguments of the global batch's shapes; their values
don't matter, only shapes are traced. Nothing is moved: build a large model under `torch.device("meta")`.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from autopar.core.errors import AutoparError
from autopar.models.built import BuiltModel, Inputs, tokens
from autopar.models.catalog import DEFAULT_BATCH

FORMS = "a module, (module, inputs) or (module, inputs, loss_fn)"


def build_own(reference: str, batch: int | None, seq: int | None) -> BuiltModel:
    """What the factory returns, in train mode. Raises AutoparError naming the user's line."""
    path, name = _split(reference)
    factory = _attribute(_load(path), path, name)
    asked = {key: value for key, value in (("batch", batch), ("seq", seq)) if value is not None}
    taken = _arguments(factory, asked)
    where = f"{name} at {_defined(factory, path)}"
    try:
        made = factory(**taken)
    except (Exception, SystemExit) as error:
        line = _line(error, path) or _defined(factory, path)
        raise AutoparError(f"{name} raised at {line}: {_said(error)}; it has to return {FORMS}") from error
    model, inputs, loss_fn = _parts(made, where)
    ignored = [key for key in asked if key not in taken]
    if inputs is None:
        inputs = _guessed(model, where, batch, seq)
    elif ignored:
        raise AutoparError(f"{where} takes no {' and no '.join(ignored)}, so its own inputs decide; leave "
                           f"{' and '.join(f'--{key}' for key in ignored)} out or let it take them by keyword")
    return BuiltModel(name, model.train(), inputs, loss_fn)


def _split(reference: str) -> tuple[Path, str]:
    path, colon, name = reference.rpartition(":")
    if not (colon and path and name.isidentifier()):
        raise AutoparError(f"model {reference!r} is not of the form path/to/file.py:factory; name the function that "
                           "makes the model after the colon")
    return Path(path), name


def _load(path: Path) -> ModuleType:
    """The user's file as a module, its folder on the search path as if it were run."""
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise AutoparError(f"cannot read {path}: {found}; check the path before the colon")
    spec = importlib.util.spec_from_file_location(f"autopar_own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise AutoparError(f"{path} is not Python; give a file that ends in .py before the colon")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise AutoparError(f"importing {path} raised at {_line(error, path) or path}: {_said(error)}; correct it, or "
                           "keep what should not run under `if __name__ == '__main__'`") from error
    return module


def _attribute(module: ModuleType, path: Path, name: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    what = f"has no {name!r}" if found is None else f"has {name!r}, but of type {type(found).__name__}"
    raise AutoparError(f"{path} {what}; needed is a function or class, found are {', '.join(own) or 'none'}")


def _arguments(factory: Callable[..., Any], asked: dict[str, int]) -> dict[str, int]:
    """What to call `factory` with."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return asked
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    default = {"batch": DEFAULT_BATCH} if "batch" in named and named["batch"].default is inspect.Parameter.empty else {}
    return default | {key: value for key, value in asked.items() if key in named}


def _parts(made: Any, where: str) -> tuple[nn.Module, Inputs | None, Any]:
    """Module, inputs and loss function of what a factory returned."""
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        kinds = ", ".join(type(part).__name__ for part in parts)
        found = f"({kinds})" if isinstance(made, tuple) else kinds
        raise AutoparError(f"{where} returned {found}; needed is {FORMS}")
    loss_fn = parts[2] if len(parts) == 3 else None
    if loss_fn is not None and not callable(loss_fn):
        raise AutoparError(f"{where} returned a loss_fn of type {type(loss_fn).__name__}; needed is a function of "
                           "output and target")
    return parts[0], _inputs(parts[1], where) if len(parts) > 1 else None, loss_fn


def _inputs(given: Any, where: str) -> Inputs:
    if isinstance(given, dict) and all(isinstance(key, str) for key in given):
        return given
    if isinstance(given, (tuple, list, Tensor)):
        return (given,) if isinstance(given, Tensor) else tuple(given)
    raise AutoparError(f"{where} returned inputs of type {type(given).__name__}; needed is a tensor, a tuple of "
                       "positional or a dict of keyword arguments")


def _guessed(model: nn.Module, where: str, batch: int | None, seq: int | None) -> Inputs:
    """Inputs of a model that came without: token ids, where its forward takes them with their labels."""
    forward = [name for name in inspect.signature(model.forward).parameters if name != "self"]
    if not {"input_ids", "labels"} <= set(forward):
        raise AutoparError(f"{where} returned only a module, whose forward takes {', '.join(forward) or 'nothing'}; "
                           f"return (module, inputs), or (module, inputs, loss_fn) where forward returns no loss")
    longest = seq or getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise AutoparError(f"{where} returned only a module, and nothing says how many tokens a sample has; give --seq "
                           "or return (module, inputs)")
    return tokens(batch or DEFAULT_BATCH, longest)


def _said(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _line(error: BaseException, path: Path) -> str:
    """`file:line` of the innermost frame in the user's folder, empty when there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    folder = path.resolve().parent
    frames = ((Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__))
    own = [f"{file}:{line}" for file, line in frames if file.is_file() and file.resolve().is_relative_to(folder)
           and "site-packages" not in file.parts and file != Path(__file__)]
    return own[-1] if own else ""


def _defined(factory: Callable[..., Any], path: Path) -> str:
    """`file:line` where `factory` is defined."""
    try:
        return f"{path}:{inspect.getsourcelines(inspect.unwrap(factory))[1]}"
    except (OSError, TypeError):
        return str(path)
