"""A call's arguments in the order a program was traced with, by position or by keyword as they come."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopar.core.errors import AutoparError
from autopar.core.told import told

EMPTY = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Form:
    """What may be passed to a model: its forward's parameters by name, in order, with their defaults (EMPTY: none).

    `targets` of the last positional arguments belong to the loss function, which has no names for them.
    """

    defaults: dict[str, Any]
    targets: int


def form_of(model: nn.Module, loss_fn: Callable[..., Any] | None) -> Form:
    """The form of a model's calls; without names where forward takes any number of arguments or tells nothing."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        parameters = {}.values()
    named = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    return Form(named, 0 if loss_fn is None else 1)


def arranged(args: tuple[Any, ...], kwargs: dict[str, Any], spec: pytree.TreeSpec, form: Form) -> list[Any]:
    """The leaves of a call in the order of `spec`. Raises AutoparError when it can't be called so."""
    count, keys = spec.children()[0].num_children, list(spec.children()[1].context)
    if len(args) != count or set(kwargs) != set(keys):
        args, kwargs = _matched(args, kwargs, count, keys, form)
    return _leaves((args, {key: kwargs[key] for key in keys}), spec)


def _matched(args: tuple[Any, ...], kwargs: dict[str, Any], count: int, keys: list[str],
             form: Form) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with `count` positional arguments and `keys` as keywords; defaults are filled in and left out."""
    own = args[:max(0, len(args) - form.targets)]
    targets, first = args[len(own):], list(form.defaults)[:max(0, count - form.targets)]
    twice = set(kwargs).intersection(list(form.defaults)[:len(own)])
    given = dict(zip(form.defaults, own, strict=False)) | kwargs
    held = {name: default for name, default in form.defaults.items() if default is not EMPTY} | given
    wanted = [*first, *keys]
    extra = [name for name in given if name not in wanted and not _is(given[name], form.defaults.get(name, EMPTY))]
    missing = [name for name in wanted if name not in held]
    if twice or extra or missing or len(own) > len(form.defaults) or len(first) + len(targets) != count:
        found = ", ".join([*([f"{len(args)} by position"] if args else []), *kwargs])
        needed = ", ".join([*first, *["the target"] * form.targets, *keys])
        raise AutoparError(f"the call has the arguments {found or 'none'}, the plan was made for {needed or 'none'}; "
                           "pass the same as when it was made")
    return (*(held[name] for name in first), *targets), {key: held[key] for key in keys}


def _is(value: object, default: object) -> bool:
    """Whether `value` is a default written out."""
    return value is default or (isinstance(value, bool | int | float | str) and type(value) is type(default)
                                and value == default)


def _leaves(value: Any, spec: pytree.TreeSpec) -> list[Any]:
    """The leaves of `value`, the entries of its dicts in the order of `spec`."""
    if spec.is_leaf():
        return [value]
    if type(value) is dict and spec.type is dict and set(value) == set(spec.context):
        value = [value[key] for key in spec.context]
    if type(value) in (list, tuple) and len(value) == spec.num_children:
        return [leaf for inner, child in zip(value, spec.children(), strict=True) for leaf in _leaves(inner, child)]
    return pytree.tree_leaves(value)


def check_leaf(node: fx.Node, leaf: Any) -> None:
    """Raises AutoparError when a tensor is none or of another kind of numbers, or what is no tensor not as planned."""
    planned = node.meta.get("val")
    if isinstance(planned, Tensor):
        if not isinstance(leaf, Tensor):
            raise AutoparError(f"input {node.name} is {told(leaf)}, the plan was made for a tensor of shape "
                               f"{tuple(planned.shape)}; pass one")
        if _kind(planned) != _kind(leaf):
            raise AutoparError(f"input {node.name} is of {leaf.dtype}, the plan was made for {planned.dtype}; convert "
                               "it, or compile again for such inputs")
    elif not _is(leaf, planned):
        raise AutoparError(f"input {node.name} is {told(leaf)}, the plan was made for {told(planned)}; pass that, or "
                           "compile again for this one")


def _kind(tensor: Tensor) -> str:
    """Numbers of one kind are converted into each other."""
    if tensor.is_floating_point():
        return "floating"
    whole = not tensor.is_complex() and str(tensor.dtype) != "torch.bool"
    return "whole" if whole else str(tensor.dtype)
