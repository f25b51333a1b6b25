"""The program of one micro-batch, made of the whole batch's: its samples are a part, its loss sums up to the whole's.

The loss of a batch is the sum of what its micro-batches return. A cross entropy's mean becomes a sum over a number
that counts the whole batch's targets and is given to the program, as the constant that `Count` tells of; other means
over samples are divided by the number of micro-batches. Batch norm may be asked to take the statistics of each
micro-batch, as one process does that adds up gradients. What mixes samples in another way, or follows a mean and is not
linear, stands in the way of more than one micro-batch.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopar.core.errors import AutoparError
from autopar.passes.additive import MIXING
from autopar.passes.capture import Program, Source
from autopar.passes.decision import Context
from autopar.passes.factors import Factored
from autopar.passes.functional import is_update, value_of
from autopar.passes.ops import Op
from autopar.passes.own_ops import LINEAR_CROSS_ENTROPY
from autopar.passes.rules.losses import MEAN, SUM
from autopar.passes.rules.nodes import argument, named, shape

aten = torch.ops.aten
COUNTED = {aten.cross_entropy_loss.default, aten.nll_loss_nd.default, LINEAR_CROSS_ENTROPY}
"""Losses that are a mean over the targets that count."""
AVERAGED = {aten.mean.default, aten.mean.dim}
"""Means over all they reduce, so that the mean of equal parts' means is the whole's."""
SUMMED = {aten.sum.default, aten.sum.dim_IntList}
SIZES = {aten.view.default: 1, aten.reshape.default: 1, aten._unsafe_view.default: 1, aten.expand.default: 1,
         aten.rand.default: 0}
"""Ops that are given the shape of their result, and where."""
SCALED = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.to.dtype, aten.neg.default,
          aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim}
"""Ops that are linear in their first operand."""
ADDED = {aten.add.Tensor, aten.sub.Tensor}
SAMPLE_STRIDE = "sample_stride"
"""In the meta of a micro-batch's nodes that have samples: the elements between two of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Count:
    """How many targets of the whole batch a loss counts: those that `targets`, of the named `inputs`, brings and that
    are not `ignored`."""

    targets: fx.GraphModule
    inputs: tuple[str, ...]
    ignored: int

    def of(self, given: dict[str, Tensor]) -> Tensor:
        """The number, of the whole batch's inputs by name; in fp32."""
        counted: Tensor = (self.targets(*(given[name] for name in self.inputs)) != self.ignored).sum()
        return counted.float()


@dataclass(frozen=True, slots=True, eq=False)
class Micro:
    """One of `parts` micro-batches, of `rows` samples each, as a program, and by constant what counts for it."""

    program: Program
    parts: int
    counts: dict[str, Count]
    rows: int = 0


def micro(context: Context, parts: int) -> Micro:
    """The program of one of `parts` micro-batches. Raises AutoparError naming what they can't be cut for."""
    program = context.segmented.factored.program
    if parts == 1:
        return Micro(program, 1, {})
    return _Cut(context, parts).cut()


def obstacle(context: Context) -> str:
    """Why a batch can't be cut into micro-batches, empty where it can."""
    try:
        _Cut(context, 2).check()
    except AutoparError as error:
        return str(error)
    return ""


@dataclass(eq=False)
class _Cut:
    """Cuts one program; `made` are the new nodes, `values` their values on meta."""

    context: Context
    parts: int
    graph: fx.Graph = field(default_factory=fx.Graph)
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Count] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.factored: Factored = self.context.segmented.factored
        self.program = self.factored.program
        self.batch = _batch_factor(self.factored)

    def cut(self) -> Micro:
        """The program of a micro-batch."""
        size = self.factored.sizes[self.batch]
        if size % self.parts:
            raise AutoparError(f"the batch of {size} does not divide into {self.parts} micro-batches; use a batch of "
                               f"{-(-size // self.parts) * self.parts}, or {_divisor_below(size, self.parts)} of them")
        losses = self.check()
        for node in self.program.graph.nodes:
            self._copy(node)
            if node in losses:
                self._share(node)
        made = replace(self.program, graph=self.graph, sources=self.program.sources | self.sources,
                       constants=self.program.constants | self.constants)
        return Micro(made, self.parts, self.counts, size // self.parts)

    # What may be cut

    def check(self) -> set[fx.Node]:
        """The nodes that reduce over samples. Raises AutoparError where they, or what follows, can't be summed up."""
        losses = {op.main for op in self.context.segmented.ops if self._reduces(op)}
        after: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            if node in losses:
                after.add(node)
            elif node.op == "call_function" and any(n in after for n in node.all_input_nodes):
                self._check_linear(node, after)
                after.add(node)
        outputs = [o for o in self.program.outputs if isinstance(o, fx.Node)]
        apart = [o for o in outputs if o not in after]
        if apart:
            raise AutoparError(f"output {apart[0].name} is no sum or mean over samples, so micro-batches can't bring a "
                               "part of it each; use 1 micro-batch")
        return losses

    def _has_batch(self, node: fx.Node) -> bool:
        return node in self.factored.dims and self.batch in self.factored.flat(node)

    def _reduces(self, op: Op) -> bool:
        """Whether `op` reduces over samples. Raises AutoparError where it mixes them in another way."""
        reads = any(self._has_batch(operand.node) for operand in op.operands)
        if not reads:
            return False
        over = [f for f in op.factors if f.role == "batch"]
        target = op.main.target
        if not over or is_update(op.main, self.program) or any(not f.shardable for f in over):
            raise self._mixed(op)
        if target in COUNTED:
            return argument(op.main, 3, "reduction", MEAN) in (MEAN, SUM) or any(f.summed for f in over)
        if target in MIXING and any(f.special for f in over):
            if self.program.batch_norm == "whole":
                raise self._mixed(op)
            return False
        if any(f.summed for f in over):
            if target not in AVERAGED | SUMMED and not _is_sum(op.main):
                raise self._mixed(op)
            return True
        return False

    def _mixed(self, op: Op) -> AutoparError:
        way = ", or batch_norm=\"micro-batch\" for statistics of each" if op.main.target in MIXING else ""
        return AutoparError(f"{op.name} ({str(op.main.target).removeprefix('aten.')}) mixes samples, so that a batch "
                            f"is more than its micro-batches; use 1 micro-batch{way}")

    def _check_linear(self, node: fx.Node, after: set[fx.Node]) -> None:
        """Raises AutoparError unless `node` makes of parts of its operands that part of its result."""
        reduced = [n in after for n in node.args if isinstance(n, fx.Node)]
        first = bool(node.args) and node.args[0] in after
        alone = first and sum(reduced) == 1 and all(n in after for n in node.all_input_nodes if n is node.args[0])
        commuted = node.target is aten.mul.Tensor and sum(reduced) == 1
        whole = node.target in ADDED and all(isinstance(a, fx.Node) and a in after for a in node.args[:2])
        if self._has_batch(node) or not (node in self.factored.aliases or whole or commuted
                                         or (node.target in SCALED and alone)):
            raise AutoparError(f"{node.meta.get('path') or 'the forward'} calls {node.target} on a loss over all "
                               "samples, which is not the sum of what micro-batches bring; use 1 micro-batch")

    # Copies

    def _copy(self, node: fx.Node) -> None:
        made = self.graph.node_copy(node, self.made.__getitem__)
        made.meta = dict(node.meta)
        if self._has_batch(node):
            flat = self.factored.flat(node)
            made.meta[SAMPLE_STRIDE] = math.prod(self.factored.refined(node)[flat.index(self.batch) + 1:])
        self.made[node] = made
        if node.op == "placeholder":
            self._placeholder(node, made)
        elif node.op == "call_function":
            self._call(node, made)

    def _placeholder(self, node: fx.Node, made: fx.Node) -> None:
        value = value_of(node)
        if value is None:
            return
        small = self._small(node)
        self.values[made] = torch.empty(small, dtype=value.dtype, device="meta")
        if small != tuple(value.shape):
            made.meta["val"] = self.values[made]
            if self.program.sources[node.name].kind == "constant":
                self.constants[node.name] = self._first(node, self.program.constants[node.name], small)
            elif self.program.sources[node.name].kind != "input":
                raise AutoparError(f"{self.program.sources[node.name].name} has a dim of samples; use 1 micro-batch")

    def _small(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of `node` in a micro-batch."""
        return tuple(size // self.parts if self.batch in dim else size
                     for size, dim in zip(shape(node), self.factored.dims[node], strict=True))

    def _first(self, node: fx.Node, value: Tensor, small: tuple[int, ...]) -> Tensor:
        """The first part of a constant that is the same for every sample."""
        for dim, size in enumerate(small):
            parts = value.unflatten(dim, (value.shape[dim] // size, size)) if size != value.shape[dim] else None
            if parts is not None and not bool((parts == parts.narrow(dim, 0, 1)).all()):
                raise AutoparError(f"constant {node.name} differs from sample to sample; use 1 micro-batch")
            value = value.narrow(dim, 0, size)
        return value

    def _call(self, node: fx.Node, made: fx.Node) -> None:
        if node.target in SIZES:
            place = SIZES[node.target]
            given: Any = node.args[place]
            if isinstance(given, (list, tuple)) and node in self.factored.dims:
                small = [new if old == full and old > 0 else old
                         for old, full, new in zip(given, shape(node), self._small(node), strict=True)]
                made.args = (*made.args[:place], small, *made.args[place + 1:])
        value = self._run(node, made)
        self.values[made] = value
        if isinstance(value, Tensor) and node in self.factored.dims and tuple(value.shape) != self._small(node):
            raise AutoparError(f"{node.meta.get('path') or 'the forward'} calls {node.target}, whose result has the "
                               f"shape {tuple(value.shape)} in a micro-batch, not {self._small(node)}; use 1 "
                               "micro-batch")
        made.meta["val"] = value

    def _run(self, node: fx.Node, made: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.values[made.args[0]][made.args[1]]  # type: ignore[index]
        args, kwargs = fx.map_arg((made.args, dict(made.kwargs)), self.values.__getitem__)
        kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), kwargs)
        try:
            return made.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError) as error:
            raise AutoparError(f"{node.meta.get('path') or 'the forward'} calls {node.target}, which a micro-batch "
                               f"does not fit ({str(error).splitlines()[0]}); use 1 micro-batch") from error

    # Losses

    def _share(self, node: fx.Node) -> None:
        """What a reduction over samples brings to the whole batch's."""
        if node.target in COUNTED and argument(node, 3, "reduction", MEAN) == MEAN:
            value = self._counted(node) if _is_numbered(node) else self._then(node, aten.div.Tensor, self.parts)
        elif node.target in AVERAGED:
            value = self._then(node, aten.div.Tensor, self.parts)
        else:
            return
        self.made[node] = value

    def _counted(self, node: fx.Node) -> fx.Node:
        """A cross entropy's mean as a sum over the count of the whole batch."""
        made, ignored = self.made[node], int(argument(node, 4, "ignore_index", -100))
        if node.target is LINEAR_CROSS_ENTROPY:
            made.args, made.kwargs = (*made.args[:3], SUM, *made.args[4:]), dict(made.kwargs)
        else:
            self._plain_sum(node, made, ignored)
        name = f"count_{len(self.counts)}"
        count = self._constant(name)
        self.counts[name] = _count(node, self.program, ignored)
        dtype = self.values[made].dtype
        wide = made if dtype == torch.float32 else self._after(made, aten.to.dtype, torch.float32)
        mean = self._after(wide, aten.div.Tensor, count)
        return mean if dtype == torch.float32 else self._after(mean, aten.to.dtype, dtype)

    def _plain_sum(self, node: fx.Node, made: fx.Node, ignored: int) -> None:
        """Make a sum of a mean."""
        names = ("logits", "target", "weight", "reduction", "ignore_index", "label_smoothing")
        given = dict(zip(names, made.args, strict=False)) | made.kwargs
        if given.get("weight") is not None:
            raise AutoparError(f"{node.name} weighs its classes, which is not counted over micro-batches; use 1 "
                               "micro-batch")
        tail = (given["label_smoothing"],) if node.target is aten.cross_entropy_loss.default and given.get(
            "label_smoothing") else ()
        made.args, made.kwargs = (given["logits"], given["target"], None, SUM, ignored, *tail), {}

    def _constant(self, name: str) -> fx.Node:
        first = next(n for n in self.graph.nodes if n.op == "placeholder")
        with self.graph.inserting_before(first):
            made = self.graph.placeholder(name)
        assert made.name == name, f"{name} is taken"
        self.sources[name], self.constants[name] = Source("constant", name), torch.ones(())
        made.meta = {"val": torch.empty((), device="meta"), "path": "", "leaf": False}
        self.values[made] = made.meta["val"]
        return made

    def _then(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        return self._after(self.made[node], target, *args)

    def _after(self, made: fx.Node, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, (made, *args))
        self.values[node] = self._run(node, node)
        node.meta = {"val": self.values[node], "path": made.meta.get("path", ""), "leaf": False}
        return node


def _batch_factor(factored: Factored) -> int:
    tensors = [n for n in factored.program.placeholders("input") if value_of(n) is not None and shape(n)]
    found = factored.dims[tensors[0]][0] if tensors else ()
    if not found:
        raise AutoparError("the call has no batch of several samples to cut; use 1 micro-batch")
    return found[0]


def _is_sum(node: fx.Node) -> bool:
    """Whether a loss is asked for the sum of its terms."""
    declared = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(a.name == "reduction" for a in declared) and named(node, "reduction") == SUM


def _is_numbered(node: fx.Node) -> bool:
    target = value_of(node.args[1])
    assert target is not None
    return not target.is_floating_point()


def _divisor_below(size: int, most: int) -> int:
    return next(n for n in range(most, 0, -1) if size % n == 0)


def _count(loss: fx.Node, program: Program, ignored: int) -> Count:
    """What counts the targets of a loss. Raises AutoparError where they are not made of inputs alone."""
    needed: set[fx.Node] = set()
    left: list[Any] = [loss.args[1]]
    while left:
        node = left.pop()
        left += [n for n in node.all_input_nodes if n not in needed]
        needed.add(node)
    graph, env, inputs, root = fx.Graph(), dict[fx.Node, fx.Node](), list[str](), nn.Module()
    for node in (n for n in program.graph.nodes if n in needed):
        kind = program.sources[node.name].kind if node.op == "placeholder" else "value"
        if kind in ("parameter", "buffer"):
            raise AutoparError(f"the targets of {loss.name} depend on {program.sources[node.name].name}, so they can't "
                               "be counted beforehand; use 1 micro-batch")
        if kind == "constant":
            root.register_buffer(node.name, program.constants[node.name], persistent=False)
            env[node] = graph.get_attr(node.name)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
            inputs += [node.name] if kind == "input" else []
    graph.output(env[loss.args[1]])  # type: ignore[index]
    return Count(fx.GraphModule(root, graph), tuple(inputs), ignored)


