"""From the values a program returns to what the plain model's forward would have returned."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.utils import _pytree as pytree

from autopar.codegen.collectives import Reshard
from autopar.codegen.executable import Executable
from autopar.core.errors import AutoparError
from autopar.core.reshard import cheapest_path
from autopar.core.spec import Spec, State
from autopar.passes.decision import cargo_of
from autopar.passes.layout import local_factors, local_shape


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

    def __eq__(self, other: object) -> bool:
        if other is None or isinstance(other, NotKept):  # as those ask that look for what is absent
            return self is other
        raise AutoparError(_not_kept(self, "=="))

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        raise AutoparError(_not_kept(found, f"torch.{getattr(function, '__name__', function)}"))

    def __repr__(self) -> str:
        return f"<output {object.__getattribute__(self, '_name')} not kept>"


_UNARY = ("neg", "pos", "abs", "invert", "len", "bool", "float", "int", "index", "complex", "array", "round")
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
_OPERATORS = (*_UNARY, *(f"{way}{name}" for name in _BINARY for way in ("", "r", "i")), "lt", "le", "gt", "ge",
              "contains", "setitem", "call")


def _refusing(operator: str) -> Any:
    def refuse(self: NotKept, *_: Any, **__: Any) -> Any:
        raise AutoparError(_not_kept(self, operator))
    return refuse


for _operator in _OPERATORS:
    setattr(NotKept, f"__{_operator}__", _refusing(f"__{_operator}__"))


def _not_kept(output: NotKept, asked: str) -> str:
    name = object.__getattribute__(output, "_name")
    return (f"output {name!r} is not kept (asked for {asked}): this model was compiled to return its loss; give "
            "returns=\"all\" to autopar.compile for its other outputs")


def output_of(executable: Executable, values: dict[fx.Node, Tensor], mesh: DeviceMesh) -> Any:
    """What the model returns, of the values that its program returns."""
    factored = executable.decision.context.segmented.factored
    program = factored.program

    def found(place: int, output: Any, name: str) -> Any:
        if not isinstance(output, fx.Node):
            return NotKept(name) if program.returns == "loss" else output
        if place not in program.lying:
            return values[factored.base(output)[0]]
        if output not in values:
            return NotKept(name)
        return as_it_lies(executable, output, values[output], mesh)

    names = _names(program.out_spec)
    flat = [found(i, o, name) for i, (o, name) in enumerate(zip(program.outputs, names, strict=True))]
    return pytree.tree_unflatten(flat, program.out_spec)


def as_it_lies(executable: Executable, node: fx.Node, value: Tensor, mesh: DeviceMesh) -> DTensor:
    """The DTensor of `node`, of which this rank has `value`: cut as its op leaves it where a DTensor can be.

    A dim is cut over its outermost factor alone: over others its parts are not in one piece, so they are gathered.
    """
    target, factored = executable.target, executable.decision.context.segmented.factored
    rank = executable.decision.context.rank(node)
    spec = executable.decision.arrival(node) or target.inputs.get(node, Spec(((),) * rank))
    starts = list(itertools.accumulate(map(len, factored.dims[node]), initial=0))
    cut = Spec(tuple(axes if i in starts else () for i, axes in enumerate(spec.dims)), spec.partial)
    path = cheapest_path(spec, cut, executable.decision.mesh, cargo_of(executable.decision.context, node), target.price)
    assert math.isfinite(path.seconds), f"no way from {spec} to {cut} for {node}"
    local = local_shape(factored, node, cut, executable.decision.mesh)
    change = Reshard(path.steps, local_factors(factored, node, spec, executable.decision.mesh), local, value.dtype,
                     target.communicator)
    dims = {starts[d]: d for d, dim in enumerate(factored.dims[node]) if dim}
    shape = torch.Size(node.meta["val"].shape)
    return DTensor.from_local(change(value), mesh, [_placement(cut.state(axis), dims) for axis in range(mesh.ndim)],
                              run_check=False, shape=shape, stride=torch.empty(shape, device="meta").stride())


def _placement(state: State, dims: dict[int, int]) -> Placement:
    if isinstance(state, int):
        return Shard(dims[state])
    return Partial() if state == "P" else Replicate()


def _names(spec: pytree.TreeSpec) -> list[str]:
    """A name for each flat output."""
    keys = spec.context if isinstance(spec.context, list) else None
    if keys and isinstance(keys[0], list):  # a dataclass: the fields that are there, and those that are None
        keys = keys[0]
    if spec.is_leaf():
        return ["output"]
    children = spec.children()
    named = keys is not None and len(keys) == len(children)
    labels = [str(k) for k in keys or ()] if named else [f"output[{i}]" for i in range(len(children))]
    return [label if child.is_leaf() else f"{label}.{name}" for label, child in zip(labels, children, strict=True)
            for name in _names(child)]
