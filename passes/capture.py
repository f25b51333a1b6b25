"""From a plain module to a Program: torch.export's training IR of the forward, with named sources.

Composite ops stay whole (`linear`, `layer_norm`, `scaled_dot_product_attention`). Nothing is allocated: the
model is exported on `meta`, whatever device it lives on.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from autopar.core.errors import AutoparError, CaptureError
from autopar.passes.blame import blame, check_call, check_static
from autopar.passes.casts import NARROWED, Casts, narrowed
from autopar.passes.certain import CertainComparisons
from autopar.passes.changes import CHANGES, check_same, notes_of, watched
from autopar.passes.containers import make_known
from autopar.passes.literals import CPU, META, Literals

log = logging.getLogger("autopar")
Precision = Literal["fp32", "bf16", "bf16-mixed", "fp16-mixed"]
COMPUTE_DTYPE: dict[str, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16,
}
Stored = Literal["by factor", "plain"]
"""The shapes parameters rest in: those in which the most can be cut plainly, or the model's own."""
Head = Literal["auto", "plain", "chunked"]
"""Where a head, a linear layer and its cross entropy, goes in chunks: where the cost layer says it wins, nowhere,
wherever it can."""
BatchNorm = Literal["whole", "micro-batch"]
"""Of what batch norm takes its statistics: of the whole batch, or of each micro-batch by itself."""
Kind = Literal["parameter", "buffer", "input", "constant"]
Returns = Literal["loss", "all"]


@dataclass(frozen=True, slots=True)
class Source:
    """What a placeholder stands for; `name` is the plain model's name, or the input's path."""

    kind: Kind
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A forward pass as a graph. `sources` describes each placeholder by node name, `constants` holds values.

    Of the outputs, those at the places `lying` are left as they lie on the mesh; all others are made whole on every
    rank.
    """

    graph: fx.Graph
    sources: dict[str, Source]
    constants: dict[str, Tensor]
    out_spec: pytree.TreeSpec
    in_spec: pytree.TreeSpec
    precision: Precision
    training: bool
    notes: tuple[str, ...] = ()
    returns: Returns = "loss"
    lying: frozenset[int] = frozenset()
    stored: Stored = "by factor"
    head: Head = "auto"
    batch_norm: BatchNorm = "whole"

    def node(self, name: str) -> fx.Node:
        """The node called `name`."""
        found: fx.Node = next(n for n in self.graph.nodes if n.name == name)
        return found

    def placeholders(self, kind: Kind) -> list[fx.Node]:
        """The placeholders that stand for `kind`, in order."""
        return [n for n in self.graph.nodes if n.op == "placeholder" and self.sources[n.name].kind == kind]

    @property
    def outputs(self) -> list[Any]:
        """The flat outputs: nodes or plain values."""
        return list(next(iter(reversed(self.graph.nodes))).args[0])

    def whole_outputs(self) -> list[fx.Node]:
        """The outputs that every rank has whole."""
        return [o for i, o in enumerate(self.outputs) if isinstance(o, fx.Node) and i not in self.lying]

    def lying_outputs(self) -> list[fx.Node]:
        """The outputs of which a rank has what it has made."""
        return [o for i, o in enumerate(self.outputs) if isinstance(o, fx.Node) and i in self.lying]


class WithLoss(nn.Module):
    """`model` followed by `loss_fn(output, target)`; the last positional input is the target."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.held = (loss_fn,)  # no submodule: its tensors are constants

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        *inputs, target = args
        return self.held[0](self.model(*inputs, **kwargs), target)


class WithLossBeside(WithLoss):
    """The same, which returns the loss and the model's output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        *inputs, target = args
        output = self.model(*inputs, **kwargs)
        return self.held[0](output, target), output


WITH_LOSS: dict[Returns, type[WithLoss]] = {"loss": WithLoss, "all": WithLossBeside}
LOSS_PREFIX = "model."


def capture(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], precision: Precision = "bf16-mixed",
            loss_fn: Callable[[Any, Any], Tensor] | None = None, returns: Returns = "loss") -> Program:
    """Trace `model(*args, **kwargs)` for `inputs = (args, kwargs)`, whose tensors have the global batch's shapes.

    The model's own mode (train or eval) is the program's; `returns` is what of its outputs will be kept. Raises
    CaptureError naming the user's line.
    """
    if precision not in tuple(COMPUTE_DTYPE):
        raise AutoparError(f"precision {precision!r} is not one of {', '.join(COMPUTE_DTYPE)}")
    check_call(model, inputs, loss_fn)
    make_known(inputs)
    args, kwargs = pytree.tree_map_only(Tensor, _meta(COMPUTE_DTYPE[precision]), inputs)
    try:
        twin = without_caches(meta_twin(model, COMPUTE_DTYPE[precision]))
        module = twin if loss_fn is None else WITH_LOSS[returns](twin, loss_fn).train(model.training)
        with warnings.catch_warnings():
            # Of the list in which recurrent layers keep their parameters, which are registered all the same.
            warnings.filterwarnings("ignore", r"The tensor attributes? self\.[^\s]*_flat_weights\[")
            module.register_forward_hook(_know_outputs)
            with watched(twin) as changes:
                exported = _exported(module, args, kwargs)
            next_one = _exported(module, args, kwargs) if changes else exported
    except Exception as error:
        raise CaptureError(blame(error, model)) from error
    check_same(changes, exported, next_one, model)
    check_static(exported.graph_module.graph, model)
    program = replace(_named(exported, module, precision, LOSS_PREFIX if loss_fn is not None else ""), returns=returns,
                      notes=notes_of(changes) + narrowed(model, inputs, COMPUTE_DTYPE[precision]))
    warn_of_changes(program)
    return program


def warn_of_changes(program: Program) -> None:
    """Log again what `capture` has warned of, where nobody heard it."""
    for note in program.notes:
        if note.startswith((CHANGES, NARROWED)):
            log.warning("%s", note)


def _know_outputs(module: nn.Module, args: Any, outputs: Any) -> None:
    """A hook that makes the types of what a module returns known."""
    make_known(outputs)


def meta_twin(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `model` without storage: parameters and buffers on `meta`, floats in `dtype`, ties kept."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        cast = dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        target = dtype if cast else tensor.dtype
        empty = torch.empty_like(tensor, device="meta", dtype=target)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def without_caches(twin: nn.Module) -> nn.Module:
    """`twin`, told not to return what only generating text needs: Hugging Face models do by default."""
    for config in (getattr(module, "config", None) for module in twin.modules()):
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False  # type: ignore[union-attr]
    return twin


def _exported(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """The export of `module`; with the lines behind its nodes where a size depends on values, which is refused."""
    from autopar.passes.private import lean_export  # torch's compiler comes with it, and only a trace is worth the wait

    def traced(*within: AbstractContextManager[Any]) -> torch.export.ExportedProgram:
        with CertainComparisons(), Casts(), ExitStack() as stack:
            for each in within:
                stack.enter_context(each)
            return torch.export.export(module, args, kwargs, strict=False)

    try:
        exported = traced(lean_export(), Literals(CPU))
    except RuntimeError as error:
        if not any(said in str(error) for said in ("FakeTensor Device Propagation", "at least two devices")):
            raise
        exported = traced(lean_export(), META, Literals(META))  # for tensors that the forward makes without a device
    if all("unbacked_bindings" not in node.meta for node in exported.graph_module.graph.nodes):
        return exported
    return traced(Literals(CPU))


def _meta(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def convert(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta", dtype=dtype if tensor.is_floating_point() else tensor.dtype)
    return convert


def _named(exported: torch.export.ExportedProgram, module: nn.Module, precision: Precision, prefix: str) -> Program:
    first_name = {id(p): name for name, p in [*module.named_parameters(), *module.named_buffers()]}
    owned = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    sources: dict[str, Source] = {}
    constants: dict[str, Tensor] = {}
    kinds: dict[InputKind, Kind] = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in kinds:
            name = first_name[id(owned[str(spec.target)])]
            sources[spec.arg.name] = Source(kinds[spec.kind], name.removeprefix(prefix))
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            sources[spec.arg.name] = Source("constant", spec.arg.name)
            constants[spec.arg.name] = _real(exported.constants[str(spec.target)], str(spec.target))
        else:
            sources[spec.arg.name] = Source("input", spec.arg.name)
    graph = exported.graph_module.graph
    leaves = {name for name, child in module.named_modules() if not list(child.children())}
    for node in graph.nodes:
        path = _module_path(node)
        node.meta["path"], node.meta["leaf"] = path.removeprefix(prefix).removesuffix(prefix[:-1]), path in leaves
    return Program(graph, sources, constants, exported.call_spec.out_spec, exported.call_spec.in_spec, precision,
                   module.training)


def keep_loss(program: Program) -> Program:
    """Keep only the loss among the outputs: the one called `loss`, else the first scalar that has a gradient.

    Raises AutoparError when the model makes no scalar.
    """
    loss = _loss(program)
    output = next(iter(reversed(program.graph.nodes)))
    output.args = (tuple(o if o is loss else None for o in program.outputs),)
    return program


def keep_all(program: Program) -> Program:
    """Keep the loss whole, and of all other tensors among the outputs what each rank makes. Raises as `keep_loss`."""
    loss = _loss(program)
    others = (i for i, o in enumerate(program.outputs) if isinstance(o, fx.Node) and o is not loss)
    return replace(program, lying=frozenset(others))


KEPT: dict[Returns, Callable[[Program], Program]] = {"loss": keep_loss, "all": keep_all}


def _loss(program: Program) -> fx.Node:
    outputs = program.outputs
    tensors = [o for o in outputs if isinstance(o, fx.Node) and isinstance(o.meta["val"], Tensor)]
    scalars = [o for o in tensors if o.meta["val"].ndim == 0 and o.meta["val"].is_floating_point()]
    if not scalars:
        shapes = ", ".join(str(tuple(o.meta["val"].shape)) for o in tensors)
        found = f"the model's outputs have shapes {shapes}" if tensors else f"the model returns {outputs}, no tensor,"
        raise AutoparError(f"{found} and none is a scalar loss; pass the labels so that it returns its loss, or give a "
                           "loss_fn= that returns a scalar")
    if not _depends_on_a_tensor(scalars[0], program):
        raise AutoparError(f"the loss, output {scalars[0].name}, depends on no parameter and no input, so there is "
                           "nothing to train; return a loss that is computed of them")
    return scalars[0]


def _real(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_meta:
        raise CaptureError(f"constant {name} of shape {tuple(tensor.shape)} lives on meta and has no value; build the "
                           "model's plain tensor attributes on a real device, or register them as buffers")
    return tensor.detach().clone()


def _module_path(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _depends_on_a_tensor(loss: fx.Node, program: Program) -> bool:
    """Whether `loss` is computed of a parameter, a buffer or an input."""
    given = {n for n in program.graph.nodes if n.op == "placeholder" and program.sources[n.name].kind != "constant"}
    seen, left = {loss}, [loss]
    while left:
        node = left.pop()
        if node in given:
            return True
        left += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return False
