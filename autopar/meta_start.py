"""Models without the memory for them: parameters on meta, what their constructors do with them recorded."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from autopar.codegen.recording import Record, Recorder

_IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]
_RECORDS: list[Record] = []
"""Those of models that are still there."""


@contextlib.contextmanager
def empty() -> Iterator[None]:
    """Modules made inside have their parameters on meta, without memory, and their buffers as ever, but for those that
    they make of parameters, as spectral norms do.

    `autopar.compile(model, ..., init=...)` gives parameters their values, of which each rank only ever holds its part
    and one whole parameter: those of a checkpoint, or what the constructors would have given them, which is recorded
    here. What is done to parameters outside, and through NumPy, is not. Raises AutoparError where a constructor looks
    at the values of parameters.
    """
    _RECORDS[:] = [record for record in _RECORDS if record.alive()]
    handle = register_module_parameter_registration_hook(_on_meta)  # type: ignore[arg-type]
    recorder = Recorder()
    try:
        with _FillRecorder(recorder.record), recorder:
            yield
    finally:
        handle.remove()
        _RECORDS.append(recorder.record)


class _FillRecorder(TorchFunctionMode):
    """Records functions of torch.nn.init that ask whether a tensor is on meta, as they do nothing if so."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        asking = sys._getframe(1)
        if func == _IS_META and found and asking.f_globals.get("__name__") == nn.init.__name__:
            code = asking.f_code
            given = {name: asking.f_locals[name] for name in code.co_varnames[:code.co_argcount]}
            self._record.add_fill(getattr(nn.init, code.co_name), given)
        return found


def recorded(tensor: Tensor) -> Record | None:
    """The record that the values of a parameter or a buffer can be made from, None without one."""
    return next((record for record in _RECORDS if record.knows(tensor)), None)


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """The same object, on meta: it may be a parameter of several modules, or have yet to become so."""
    if parameter is None or parameter.is_meta or isinstance(parameter, UninitializedParameter):
        return None
    twin = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, twin)
    return parameter
