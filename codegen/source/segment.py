"""One lowered segment as a function: a statement an op, views written into the calls that take them."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autopar.codegen.collectives import Reshard
from autopar.codegen.executable import Call
from autopar.codegen.lower import Target
from autopar.codegen.reprice import Shapes
from autopar.codegen.source.layout import statement
from autopar.codegen.source.names import Scope
from autopar.codegen.source.ops import MODULES, VIEWS, Text, literal, op_text
from autopar.codegen.source.reshards import reshard_text
from autopar.codegen.source.resting import resting_spec
from autopar.core.spec import Spec
from autopar.passes.capture import COMPUTE_DTYPE
from autopar.passes.layout import from_base, local_factors, local_shape
from autopar.passes.notation import merged
from autopar.passes.strategies import storage_dims

aten = torch.ops.aten

@dataclass(frozen=True, slots=True)
class Function:
    """A written function: what it is called, its arguments by the segment's externals, whether it takes a seed, its
    lines."""

    name: str
    words: tuple[str, ...]
    seeded: bool
    lines: tuple[str, ...]


def written(each: Call, name: str, words: tuple[str, ...], target: Target) -> Function:
    """The function `name` of a call's lowered segment, whose externals are the arguments `words`."""
    return _Writer(each, words, target).run(name)


@dataclass(eq=False)
class _Writer:
    call: Call
    words: tuple[str, ...]
    target: Target
    scope: Scope = field(default_factory=Scope)
    texts: dict[fx.Node, Text] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        lowered, self.decision = self.call.lowered, self.target.decision
        self.shapes = Shapes(lowered.module)
        with torch.no_grad():
            self.shapes.run(*arrivals(self.call, self.target), torch.empty((), dtype=torch.int64, device="meta"))
        self.env = self.shapes.env
        self.nodes = list(lowered.module.graph.nodes)
        self.last = self._last_reads()

    def run(self, name: str) -> Function:
        """The whole function."""
        *externals, seed = [n for n in self.nodes if n.op == "placeholder"]
        for node, word in zip(externals, self.words, strict=True):
            self.texts[node] = Text(self.scope.new(word))
        self.texts[seed] = Text("seed")
        self.own = {n: self.scope.new(self._op_name(n)) for n in self.nodes if self._is_result(n)}
        for place, node in enumerate(self.nodes):
            if node.op in ("call_function", "call_module") and node not in self.texts:
                self._write(node, place)
        results = tuple(str(self.texts[n]) for n in self.nodes[-1].args[0])
        arguments = [f"    {self.texts[n]}: Tensor,{self._note(n, '  # ')}" for n in externals]
        seeded = bool(seed.users)
        kind = "Tensor" if len(results) == 1 else f"tuple[{', '.join(['Tensor'] * len(results))}]"
        seed_line = ["    seed: Tensor,"] if seeded else []
        head = [f"def {name}(", "    rank: Rank,", *arguments, *seed_line, f") -> {kind}:"]
        words = tuple(str(self.texts[n]) for n in externals)
        return Function(name, words, seeded, (*head, *self.lines, f"    return {', '.join(results)}"))

    # Which expressions stand inside of others

    def _last_reads(self) -> dict[fx.Node, int]:
        """By node with a name of its own, the place of the last statement that reads it."""
        found: dict[fx.Node, int] = {}
        for place, node in enumerate(self.nodes):
            if not self._inside(node):
                found.update(dict.fromkeys(self._roots(node), place))
        return found

    def _roots(self, node: fx.Node) -> set[fx.Node]:
        """The named nodes that the text of `node` reads."""
        return {root for n in node.all_input_nodes for root in (self._roots(n) if self._inside(n) else {n})}

    def _inside(self, node: fx.Node) -> bool:
        """Whether a node is no statement: it changes nothing, or is a view that is read once."""
        if node.op != "call_function" or node.target not in VIEWS:
            return False
        return self._idle(node) or (len(node.users) == 1 and next(iter(node.users)).op != "output")

    def _idle(self, node: fx.Node) -> bool:
        source, made = self.env[node.all_input_nodes[0]], self.env[node]
        if node.target in (aten.reshape.default, aten.to.dtype):
            return bool(source.shape == made.shape and source.dtype == made.dtype)
        return False

    # Statements

    def _write(self, node: fx.Node, place: int) -> None:
        if self._inside(node):
            self.texts[node] = self.texts[node.all_input_nodes[0]] if self._idle(node) else self._text(node)
            return
        text, parts = self._text(node), list(node.users)
        if parts and all(n.target is operator.getitem for n in parts) and isinstance(self.env[node], list | tuple):
            self._unpack(node, text, place)
            return
        name = self._name(node, place) if parts else ""
        self.lines += statement(name, text, self._note(node))
        self.texts[node] = Text(name)

    def _unpack(self, node: fx.Node, text: Text, place: int) -> None:
        names = ["_"] * len(self.env[node])
        for item in node.users:
            i = item.args[1]
            assert isinstance(i, int)
            whole = node.args[0]
            source = whole[i] if isinstance(whole, tuple) else None
            wish = str(self.texts[source]) if isinstance(source, fx.Node) else self._wish(item, i)
            reuse = isinstance(source, fx.Node) and self.last.get(source) == place
            names[i] = wish if reuse else self.scope.new(wish)
            self.texts[item] = Text(names[i])
        note = self._note(next(iter(node.users))) if node.target is aten.split.Tensor else ""
        self.lines += statement(", ".join(names) if len(names) > 1 else f"({names[0]},)", text, note)

    def _wish(self, item: fx.Node, i: int) -> str:
        if "op" in item.meta:
            return f"{self._op_name(item)}_{i}"
        sources = self._roots(item.all_input_nodes[0])
        return f"{self.texts[next(iter(sources))]}_{i}"

    def _name(self, node: fx.Node, place: int) -> str:
        """The name of an op for its result, that of an op's kind inside of it; views and reshards go on with the name
        of what they bring into another form, where nothing reads that later."""
        if node in self.own:
            return self.own[node]
        if "op" in node.meta:
            return self.scope.new(self._kind(node))
        source = next(iter(self._roots(node)), None)
        if source is None:
            return self.scope.new(node.name)
        name = str(self.texts[source])
        return name if self.last.get(source) == place else self.scope.new(name)

    def _kind(self, node: fx.Node) -> str:
        """What a node does, in a word."""
        if node.op == "call_module":
            return type(self.shapes.submodules[str(node.target)]).__name__.lower()
        return str(getattr(node.target, "__name__", "x")).partition(".")[0]

    def _is_result(self, node: fx.Node) -> bool:
        """Whether a node makes what its op does."""
        if "op" not in node.meta:
            return False
        results = self.decision.context.segmented.ops[node.meta["op"]].results
        return any(result.node is node.meta["origin"] for result in results)

    def _op_name(self, node: fx.Node) -> str:
        """The name of a node's op in the block."""
        name: str = self.decision.context.segmented.ops[node.meta["op"]].name
        return name.removeprefix(f"{self.call.lowered.segment.name}_")

    def _text(self, node: fx.Node) -> Text:
        texts: Any = self.texts.__getitem__
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), texts)
        if node.op == "call_function":
            return op_text(node.target, args, kwargs)
        module = self.shapes.submodules[str(node.target)]
        if isinstance(module, Reshard):
            source = node.all_input_nodes[0]
            port = node.meta["lies"][0]
            counts = tuple(map(len, self.decision.context.segmented.factored.dims[port]))
            return reshard_text(module, self.texts[source], tuple(self.env[source].shape), counts,
                                node.meta["reshard"][1])
        return MODULES[type(module)](module, args, kwargs)

    def _note(self, node: fx.Node, before: str = "") -> str:
        """The shape of a value here, and how it lies on the mesh."""
        made = self.env[node]
        if not isinstance(made, Tensor):
            return ""
        return f"{before}{literal(tuple(made.shape))} {self._spec(node)}".rstrip()

    def _spec(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            external = self.call.lowered.segment.externals[self.nodes.index(node)]
            if external in self.decision.storage:
                return resting_spec(self.decision, external)
        held, spec = node.meta.get("lies", (None, None))
        factored = self.decision.context.segmented.factored
        if held is None or spec is None or held not in factored.dims:
            return ""
        found = merged(factored, held, from_base(spec, factored.base(held)[1]))
        return str(found) if len(found.dims) == self.env[node].ndim else ""


def arrivals(each: Call, target: Target) -> list[Tensor]:
    """The externals of a call's lowered segment on `meta`, as they come in: parameters in the shape they are stored in.
    """
    decision = target.decision
    factored = decision.context.segmented.factored
    found = []
    for node in each.lowered.segment.externals:
        dtype: torch.dtype = node.meta["val"].dtype
        if node in decision.storage:
            storage = decision.storage[node]
            sizes = local_factors(factored, node, storage.spec(len(factored.flat(node)), False), decision.mesh)
            shape = tuple(math.prod(sizes[i] for i in dim) for dim in storage_dims(factored, node))
            mixed = factored.program.precision.endswith("-mixed") and dtype == COMPUTE_DTYPE[factored.program.precision]
            dtype = torch.float32 if mixed else dtype
        else:
            spec = decision.arrival(node) or target.inputs.get(node) or Spec(((),) * len(factored.flat(node)))
            shape = local_shape(factored, node, spec, decision.mesh)
        found.append(torch.empty(shape, dtype=dtype, device="meta"))
    return found
