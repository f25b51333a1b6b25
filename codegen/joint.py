"""A joint graph read as values that may be kept, and cut where a plan keeps them.

Nodes that depend on a gradient are the backward; it reads what it needs from the others, which are run again unless
they are kept. What can be kept are the marked values, called as `marks` says, and their by-products, called so with a
`+`: what is made on the way to a marked value and is cheaper to keep than to make again, which are results of ops that
are no pointwise work, statistics, and masks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from autopar.codegen import private
from autopar.codegen.marks import MARK

aten = torch.ops.aten
SMALL = 8
"""By how much a statistic is smaller than what it is of."""
COSTLY = ("mm", "bmm", "addmm", "baddbmm", "convolution", "sort", "topk", "cumsum", "scaled_dot_product",
          "attention_with_dropout", "wait_tensor")
"""Parts of the names of ops that run as kernels of their own."""
PIERCED = {aten.view.default, aten.t.default, aten.transpose.int, aten.permute.default, aten.reshape.default,
           aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.detach.default,
           aten.alias.default, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor,
           aten.squeeze.default, aten.split_with_sizes.default, aten.as_strided.default}
"""Ops whose results share their first operand's memory."""


@dataclass(frozen=True, eq=False)
class Joint:
    """A joint graph of which the first `outputs` outputs are the forward's; `called` names its marked nodes."""

    module: fx.GraphModule
    outputs: int
    called: dict[fx.Node, tuple[str, ...]]

    @cached_property
    def backward(self) -> frozenset[fx.Node]:
        """The nodes that depend on a gradient."""
        found: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            if ("tangents" in node.name and node.op == "placeholder") or any(n in found for n in node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    @cached_property
    def regions(self) -> dict[fx.Node, str]:
        """The first marked value that each forward node leads to."""
        found: dict[fx.Node, str] = {}
        for node in reversed(self.module.graph.nodes):
            if node in self.called:
                found[node] = self.called[node][0]
            elif node not in self.backward and node.op == "call_function":
                after = [found[user] for user in reversed(node.users) if user in found]
                if after:
                    found[node] = after[-1]
        for node in self.module.graph.nodes:
            if node.target is operator.getitem and node not in found and node.args[0] in found:
                found[node] = found[node.args[0]]
        return found

    @cached_property
    def names(self) -> dict[fx.Node, str]:
        """What each node is kept as that can be kept."""
        largest: dict[str, int] = {}
        for node, region in self.regions.items():
            largest[region] = max(largest.get(region, 0), size_of(node))
        by_products = {node: f"{region}+" for node, region in self.regions.items()
                       if node not in self.called and _by_product(node, largest[region])}
        return by_products | {node: names[0] for node, names in self.called.items()}

    @cached_property
    def renamings(self) -> frozenset[fx.Node]:
        """The nodes that are their first operand in another shape."""
        return frozenset(node for node in self.module.graph.nodes if node.target in PIERCED)

    @property
    def ends(self) -> list[fx.Node]:
        """What the backward returns."""
        returned = self.module.graph.output_node().args[0]
        return [node for node in returned[self.outputs:] if isinstance(node, fx.Node)]  # type: ignore[index,union-attr]

    def read(self, node: fx.Node) -> list[fx.Node]:
        """What running `node` again takes: the nearest nodes that can be kept, and inputs, seen through all others."""
        return list(dict.fromkeys(self._frontier(node)))

    @cached_property
    def needed(self) -> list[fx.Node]:
        """What the backward takes of the forward, as `read` sees it."""
        found: dict[fx.Node, None] = {}
        for node in self.module.graph.nodes:
            if node in self._live_backward or (node in self.ends and node not in self.backward):
                for source in node.all_input_nodes:
                    if source not in self.backward:
                        found.update(dict.fromkeys(self._behind(source)))
        for node in self.ends:
            if node not in self.backward:
                found.update(dict.fromkeys(self._behind(node)))
        return list(found)

    @cached_property
    def _live_backward(self) -> frozenset[fx.Node]:
        live: set[fx.Node] = set()
        waiting = [node for node in self.ends if node in self.backward]
        while waiting:
            node = waiting.pop()
            if node not in live:
                live.add(node)
                waiting += [n for n in node.all_input_nodes if n in self.backward]
        return frozenset(live)

    def _frontier(self, node: fx.Node) -> Iterator[fx.Node]:
        for source in node.all_input_nodes:
            yield from self._behind(source)

    def _behind(self, node: fx.Node) -> list[fx.Node]:
        """`node` if it can be kept or is an input, else what it takes."""
        if node not in self._behind_cache:
            stops = node in self.names or node.op in ("placeholder", "get_attr")
            self._behind_cache[node] = [node] if stops else self.read(node)
        return self._behind_cache[node]

    @cached_property
    def _behind_cache(self) -> dict[fx.Node, list[fx.Node]]:
        return {}

    def saved(self, kept: frozenset[str]) -> list[fx.Node]:
        """The nodes that the backward takes from the forward if it keeps what is called `kept`; inputs among them."""
        found: dict[fx.Node, None] = {}
        seen, waiting = set[fx.Node](), list(reversed(self.needed))
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            every = self.called.get(node, (self.names.get(node, ""),))
            if node.op == "placeholder" or any(name in kept for name in every):
                found[node] = None
            else:
                waiting += reversed(self.read(node))
        return list(found)


def joint(module: fx.GraphModule, outputs: int) -> Joint:
    """The joint graph of a marked module, the marks taken out of it."""
    called: dict[fx.Node, tuple[str, ...]] = {}
    for node in module.graph.find_nodes(op="call_function", target=MARK):
        source, name = node.args
        base = _base(source)
        if base.op != "placeholder":
            called[base] = (*called.get(base, ()), name)
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
    return Joint(module, outputs, called)


def _base(node: fx.Node) -> fx.Node:
    """The node whose memory `node` is in; marks between them are seen through."""
    while node.target in PIERCED or node.target is MARK:
        node = node.args[0]  # type: ignore[assignment]
    return node


@dataclass(frozen=True, slots=True)
class Cut:
    """Cuts marked joint graphs so that what is called `kept` is kept for the backward, and nothing else but inputs."""

    kept: tuple[str, ...]

    def __call__(self, module: fx.GraphModule, outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        found = joint(module, outputs)
        return private.cut_joint(module, found.saved(frozenset(self.kept)), outputs)


def _by_product(node: fx.Node, largest: int) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or node.target in PIERCED:
        return False
    return costly(node) or value.dtype == torch.bool or size_of(node) * SMALL <= largest


def costly(node: fx.Node) -> bool:
    """Whether `node` runs as a kernel of its own."""
    made_by = node.args[0] if node.target is operator.getitem else node
    return isinstance(made_by, fx.Node) and made_by.op == "call_function" and _is_costly(made_by.target)


def _is_costly(target: Any) -> bool:
    name = getattr(target, "_opname", getattr(target, "__name__", ""))
    return any(part == name or (len(part) > 7 and part in name) for part in COSTLY)


def size_of(node: fx.Node) -> int:
    """Bytes of the tensor that `node` is, 0 for what is none."""
    value: Any = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
