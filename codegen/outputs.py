"""From the values a program returns to what the plain model's forward would have returned."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.core.errors import AutoparError
from autopar.passes.decision import Decision


class NotKept:
    """Stands for an output other than the loss, which is not kept; any use of it says so."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AutoparError(_not_kept(self, f".{name}"))

    def __getitem__(self, key: Any) -> Any:
        raise AutoparError(_not_kept(self, f"[{key!r}]"))

    def __repr__(self) -> str:
        return f"<output {object.__getattribute__(self, '_name')} not kept>"


def _not_kept(output: NotKept, asked: str) -> str:
    name = object.__getattribute__(output, "_name")
    return (f"output {name!r} is not kept (asked for {asked}): this model was compiled to return its loss; give "
            "returns=\"all\" to autopar.compile for its other outputs")


def output_of(decision: Decision, values: dict[fx.Node, Tensor]) -> Any:
    """What the model returns, of the values that its program returns."""
    factored = decision.context.segmented.factored
    program = factored.program
    flat = [values[factored.base(o)[0]] if isinstance(o, fx.Node) else NotKept(name)
            for o, name in zip(program.outputs, _names(program.out_spec), strict=True)]
    return pytree.tree_unflatten(flat, program.out_spec)


def _names(spec: pytree.TreeSpec) -> list[str]:
    """A name for each flat output."""
    keys = spec.context if isinstance(spec.context, list) else None
    if spec.is_leaf():
        return ["output"]
    children = spec.children()
    named = keys is not None and len(keys) == len(children)
    labels = [str(k) for k in keys or ()] if named else [f"output[{i}]" for i in range(len(children))]
    return [label if child.is_leaf() else f"{label}.{name}" for label, child in zip(labels, children, strict=True)
            for name in _names(child)]
