"""From a call's arguments to a program's inputs: which program, whose part of the batch, and back to its output."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.codegen.calls import Form, arranged, check_leaf
from autopar.codegen.executable import Executable
from autopar.core.errors import AutoparError

BatchKind = Literal["global", "local"]
Shapes = tuple[tuple[int, ...], ...]


class NotKept:
    """Stands for an output other than the loss, which is not kept; any use of it says so."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        kept = object.__getattribute__(self, "_name")
        raise AutoparError(f"output {kept!r} is not kept (asked for .{name}): a compiled model returns its loss; for "
                           "other outputs load model.state_dict() into the plain model")

    def __getitem__(self, key: Any) -> Any:
        kept = object.__getattribute__(self, "_name")
        raise AutoparError(f"output {kept!r} is not kept (asked for [{key!r}]): a compiled model returns its loss; for "
                           "other outputs load model.state_dict() into the plain model")

    def __repr__(self) -> str:
        return f"<output {object.__getattribute__(self, '_name')} not kept>"


@dataclass(frozen=True, eq=False)
class Bound:
    """One call: the executable, its inputs on the device, how to make the model's output of the values."""

    executable: Executable
    inputs: dict[fx.Node, Tensor]
    output: Callable[[dict[fx.Node, Tensor]], Any]


@dataclass(eq=False)
class Batches:
    """Finds the executable for a call. `make(training, kind)` lowers one; `kind` None lets shapes tell."""

    make: Callable[[bool, BatchKind], Executable]
    kind: BatchKind | None
    world: int
    form: Form
    known: dict[tuple[bool, BatchKind], Executable] = field(default_factory=dict)
    checked: set[Shapes] = field(default_factory=set)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, site: Any) -> Bound:
        """The program for a call and its inputs. Raises AutoparError when the batch fits no rule."""
        sample = self._executable(training, next(iter(self.known))[1] if self.known else self.kind or "global")
        program = sample.decision.context.segmented.factored.program
        placeholders = program.placeholders("input")
        try:
            leaves = arranged(args, kwargs, program.in_spec, self.form)
            check_leaves(leaves, placeholders)
        except AutoparError:
            with contextlib.suppress(AutoparError):  # what others bring: they must not wait for this rank
                self._agree([], pytree.tree_leaves((args, kwargs)), [])
            raise
        kind = self._kind(leaves, placeholders)
        executable = self._executable(training, kind)
        nodes = executable.decision.context.segmented.factored.program.placeholders("input")
        inputs = {n: leaf.to(site.device) for n, leaf in zip(nodes, leaves, strict=True) if isinstance(leaf, Tensor)}
        inputs = {n: _cast(n, leaf) for n, leaf in inputs.items()}
        return Bound(executable, inputs, lambda values: _output(executable, values))

    def _executable(self, training: bool, kind: BatchKind) -> Executable:
        if (training, kind) not in self.known:
            self.known[training, kind] = self.make(training, kind)
        return self.known[training, kind]

    def _kind(self, leaves: list[Any], placeholders: list[fx.Node]) -> BatchKind:
        """Whether the call brings the whole batch or a part. Collective, so that ranks which differ are told."""
        planned = [tuple(p.meta["val"].shape) if isinstance(p.meta.get("val"), Tensor) else None for p in placeholders]
        found = [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves]
        even = all(not s or s[0] % self.world == 0 for s in planned)
        local = [(s[0] // self.world, *s[1:]) if s else s for s in planned] if even else None
        options: list[BatchKind] = ["global"] if found == planned and self.kind != "local" else []
        options += ["local"] if found == local and self.kind != "global" else []
        self._agree(options, leaves, found)
        if options:
            return options[0]
        parts = f"{local} (its own part on each)" if even else f"parts, which {planned} can't be cut into evenly"
        wanted = {"global": f"{planned}", "local": parts,
                  None: f"{planned} (the whole batch on every rank) or {parts}"}[self.kind]
        raise AutoparError(f"inputs of shapes {found} fit no rule of the plan, which takes {wanted}; pass such a "
                           "batch, or compile again with inputs= of the new shapes")

    def _agree(self, options: list[BatchKind], leaves: list[Any], found: list[Any]) -> None:
        """Raises AutoparError when ranks bring whole and partial batches at once, or whole ones that differ.

        Looked at in every call where the data is in host memory, else in the first of its shapes, as others that know
        them don't: reading a GPU's memory would make it wait.
        """
        shapes = tuple(s for s in found if s is not None)
        on_host = all(leaf.device.type == "cpu" for leaf in leaves if isinstance(leaf, Tensor))
        seen = shapes in self.checked or (self.checked and not options)
        if self.world == 1 or (seen and not on_host):
            return
        self.checked.add(shapes)
        if not all_equal({"global": 1, "local": 2}.get(options[0], 0) if options else 0):
            raise AutoparError(f"ranks brought batches of different kinds, this one inputs of shapes {found}; pass the "
                               "whole batch on every rank, or on each its own part")
        if options[:1] == ["global"] and not all_equal(digest(leaves)):
            raise AutoparError(f"every rank passed a batch of the global shapes {list(shapes)}, but their data "
                               "differ; pass the same whole batch on all ranks, or each rank's own part of it")


def digest(leaves: list[Any]) -> int:
    """A number that tells different data apart."""
    found = hashlib.sha256()
    for leaf in leaves:
        found.update(_raw(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
    return int.from_bytes(found.digest()[:7], "big")


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def all_equal(number: int) -> bool:
    """Whether all ranks have the same number; collective."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    bounds = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    return bool(bounds[0] == -bounds[1])


def check_leaves(leaves: list[Any], placeholders: list[fx.Node]) -> None:
    """Raises AutoparError unless there is a leaf of its kind for each placeholder."""
    if len(leaves) != len(placeholders):
        raise AutoparError(f"the call has {len(leaves)} inputs, the plan was made for {len(placeholders)}: "
                           f"{[p.name for p in placeholders]}; pass the same as when it was made")
    lacking = [node.name for node, leaf in zip(placeholders, leaves, strict=True)
               if leaf is None and isinstance(node.meta.get("val"), Tensor)]
    if lacking:
        raise AutoparError(f"the call has no {' and no '.join(lacking)}, the plan was made for "
                           f"{', '.join(p.name for p in placeholders)}; pass the same as when it was made")
    for node, leaf in zip(placeholders, leaves, strict=True):
        check_leaf(node, leaf)


def _cast(node: fx.Node, leaf: Tensor) -> Tensor:
    wanted: torch.dtype = node.meta["val"].dtype
    return leaf.to(wanted)


def _output(executable: Executable, values: dict[fx.Node, Tensor]) -> Any:
    program = executable.decision.context.segmented.factored.program
    base = executable.decision.context.segmented.factored.base
    names = _names(program.out_spec)
    flat = [values[base(o)[0]] if isinstance(o, fx.Node) else NotKept(name)
            for o, name in zip(program.outputs, names, strict=True)]
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
