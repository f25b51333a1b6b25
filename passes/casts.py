"""Operands of one op in several floating dtypes, brought to one while a forward is traced.

Parameters and inputs are traced in the dtype that is computed in, buffers and what a forward makes stay as they are:
`self.scale * x` with a buffer in fp32 is in fp32, and the matmul after it would meet a weight in bf16. As under
autocast a matmul, a convolution or attention then takes all in the lower, a norm all in the wider.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autopar.core.told import some

_NAMES = ("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
          "conv_transpose3d", "scaled_dot_product_attention", "multi_head_attention_forward", "matmul", "__matmul__",
          "__rmatmul__", "mm", "bmm", "mv", "dot", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "chain_matmul",
          "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
LOWER = frozenset(getattr(owner, name) for owner in (torch, Tensor, F, torch._VF) for name in _NAMES
                  if hasattr(owner, name))
"""Functions that compute in the lowest of their operands' dtypes."""
WIDER = frozenset({F.layer_norm, F.group_norm, F.rms_norm, torch.layer_norm, torch.group_norm, torch.rms_norm,
                   torch.prelu})
"""Those that compute in the widest."""


NARROWED = "nothing computes in float64: "
"""How notes of what is given in it begin."""


def narrowed(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], dtype: torch.dtype) -> tuple[str, ...]:
    """What is said of parameters and inputs in float64, which are cast to `dtype`; nothing where there are none."""
    args, kwargs = inputs
    given = [(f"input {name}", x) for name, each in (*enumerate(args), *kwargs.items())
             for x in pytree.tree_leaves(each)]
    wide = [name for name, x in (*given, *((f"parameter {name}", p) for name, p in model.named_parameters()))
            if isinstance(x, Tensor) and x.dtype == torch.float64]
    return (f"{NARROWED}{some(wide)} in it are cast to {str(dtype).removeprefix('torch.')} as precision= has it; call "
            ".float() on them beforehand, which halves what they take",) if wide else ()


class Casts(TorchFunctionMode):
    """Calls functions of both sets with operands of one dtype; all others as they are."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        named = kwargs or {}
        if function in LOWER or function in WIDER:
            args, named = _alike(args, named, min if function in LOWER else max)
        return function(*args, **named)


def _alike(args: tuple[Any, ...], named: dict[str, Any],
           choose: Callable[..., torch.dtype]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with all floating tensors in one of their dtypes."""
    dtypes = {x.dtype for x in pytree.tree_leaves((args, named)) if isinstance(x, Tensor) and x.is_floating_point()}
    if len(dtypes) < 2:
        return args, named
    dtype = choose(dtypes, key=lambda each: each.itemsize)
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, named))
    return found
