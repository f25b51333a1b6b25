"""torch's private parts that capture touches: `torch.export`, less what it does for others.

An export spends more on what surrounds the program than on the program. Inside `lean_export` it leaves out:

- the stack trace, the second description of the result (`tensor_meta`) and the torch function behind each node;
- Python source of a graph module at every change: it is written when a module is first called;
- looking through every node for sizes that depend on values, where tracing has met none;
- flattening and copying the arguments of an op several times: `_record` takes them as they are;
- looking whether the values of a mask that `nn.Transformer` is given are causal, which meta cannot tell:
  `FoldConstants` looks afterwards.

The graph, its names, the values' metadata and module paths are the same, which tests compare op by op. What stands in
for a part of torch does only the ordinary case itself and leaves all else to that part. Names and signatures are those
of torch 2.11 and 2.13 alike.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import _trace
from torch.fx import _lazy_graph_module
from torch.fx.experimental import proxy_tensor
from torch.fx.traceback import has_preserved_node_meta
from torch.nn.modules import transformer

aten = torch.ops.aten
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
_REWRITTEN = {aten.lift_fresh.default, aten.is_nonzero.default}
"""Ops that torch records as others."""


@contextlib.contextmanager
def lean_export() -> Iterator[None]:
    """Inside, `torch.export.export` makes the same graph in half the time. Not for several threads at once."""
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in _STAND_INS]
    try:
        for owner, name, stand_in in _STAND_INS:
            setattr(owner, name, stand_in)
        with _lazy_graph_module._use_lazy_graph_module(True):
            yield
    finally:
        for owner, name, own in before:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def _no_metadata(*_: Any, **__: Any) -> None:
    """In place of `_extract_tensor_metadata`."""


def _rebind(gm: fx.GraphModule, original: Callable[[fx.GraphModule], None] = _trace._replace_unbacked_bindings) -> None:
    """In place of `_replace_unbacked_bindings`: a size that depends on values is bound where it first occurs."""
    if any("unbacked_bindings" in node.meta for node in gm.graph.nodes):
        original(gm)


def _causal_if_said(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """In place of `_detect_is_causal_mask`, whose answer is a hint: the mask goes along with it."""
    return is_causal is True


class _Extraordinary(Exception):
    """Arguments that `_record` leaves to torch."""


def _record(mode: Any, func: Any, pre_dispatch: bool, args: Any, kwargs: Any,
            original: Callable[..., Any] = proxy_tensor.proxy_call) -> Any:
    """In place of `proxy_call`: add a call of `func` to the graph, run it and note what node its results are of."""
    tracer = mode.tracer
    if not (pre_dispatch and _as_called(func, mode)):
        return original(mode, func, pre_dispatch, args, kwargs)
    try:
        read = _nodes(args, tracer.tensor_tracker)
        named = {key: _nodes(value, tracer.tensor_tracker) for key, value in kwargs.items()}
    except _Extraordinary:
        return original(mode, func, pre_dispatch, args, kwargs)
    node = tracer.graph.create_node("call_function", func, read, named, name=_name(func))
    node.meta["nn_module_stack"] = {key: (path, _class_name(kind)) for key, (path, kind) in tracer.module_stack.items()}
    with proxy_tensor._enable_thunkify(tracer):
        out = func(*args, **kwargs)
    proxy = fx.Proxy(node, tracer)
    if _concrete(out):
        proxy_tensor.set_proxy_slot(out, tracer, proxy_tensor._ProxyTensor(proxy, None))
        node.meta["val"] = proxy_tensor.snapshot_fake(out)
    else:
        proxy_tensor.track_tensor_tree(out, proxy, constant=None, tracer=tracer)
    return out


def _as_called(func: Any, mode: Any) -> bool:
    """Whether `func` is recorded as it is called, with its module's path and nothing else beside it."""
    table = getattr(mode, "decomposition_table", None)  # on 2.11 there is one for all modes
    decomposed = vars(proxy_tensor)["CURRENT_DECOMPOSITION_TABLE"] if table is None else table
    return (isinstance(func, torch._ops.OpOverload) and func not in _REWRITTEN and func not in decomposed
            and isinstance(mode.tracer, proxy_tensor._ModuleStackTracer) and not has_preserved_node_meta())


def _concrete(out: Any) -> bool:
    """Whether `out` is one tensor, and no symbol stands for a size or value of its or waits to be found in it."""
    if type(out) is not FakeTensor or out._has_symbolic_sizes_strides:
        return False
    symbols = out.fake_mode.shape_env
    return symbols is None or not symbols.pending_fresh_unbacked_symbols


def _nodes(value: Any, tracker: Any) -> Any:
    """`value` with the nodes of its tensors; raises _Extraordinary for constants, symbols and what is not traced."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list or kind is tuple:
        return kind([_nodes(item, tracker) for item in value])
    slot = tracker.get(value) if kind is FakeTensor else None
    if slot is None or slot.constant is not None:
        raise _Extraordinary
    return slot.proxy.node


@functools.cache
def _name(func: Any) -> str:
    return str(fx.Graph()._target_to_str(func.overloadpacket.__name__))


def _class_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else kind


_STAND_INS: tuple[tuple[Any, str, Any], ...] = (
    (proxy_tensor._ModuleStackTracer, "record_stack_traces", property(lambda _: False, lambda _, asked: None)),
    (proxy_tensor, "_extract_tensor_metadata", _no_metadata),
    (proxy_tensor, "proxy_call", _record),
    (_trace, "_replace_unbacked_bindings", _rebind),
    (transformer, "_detect_is_causal_mask", _causal_if_said),
)


def parts_of(node: fx.Node) -> fx.Graph:
    """The ops that torch writes the composite op of `node` as; a placeholder for each of its input nodes, in order."""
    target, inputs = node.target, node.all_input_nodes
    assert isinstance(target, torch._ops.OpOverload)

    def call(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), given.__getitem__)
        return target.decompose(*args, **kwargs)

    empty = (torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta")
             for v in (n.meta["val"] for n in inputs))
    return proxy_tensor.make_fx(call)(*empty).graph
