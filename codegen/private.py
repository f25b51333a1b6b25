"""The one module that touches torch's private parts; each use says why, and how torch 2.11 and 2.13 differ.

Collectives are the ops of `_c10d_functional`: unlike `torch.distributed.all_reduce` and its kin they return a new
tensor, so `torch.compile` can trace, reorder and plan memory around them.

- The ops are called rather than the wrappers in `_functional_collectives`: the wrappers return a lazily waiting
  tensor subclass in eager mode, and 2.13 renames them (`all_gather_tensor` to `all_gather_single`, the old name warns).
- A group goes in by name: 2.11 declares the argument `str`, 2.13 takes a name or a ProcessGroup. One without a name
  connects to nobody: `stand_in` takes its place.
- The ops bring gradient formulas of their own in both versions. They know nothing of partial gradients, so callers
  wrap every use in an autograd function.
- `_are_we_tracing` is the one test that sees Dynamo, export and a bare AOTAutograd alike; the same in both versions.
- `TorchDispatchMode` is documented as a way to see every op, and has no public name; the same in both versions.
- `StorageWeakRef` tells storages apart for as long as it lives, which `data_ptr()` can't for those on meta; the same in
  both versions.
- `_new_with_weak_ptr` gives back a storage of which only such a reference is held; the same in both versions.
- Importing `_functional_collectives` registers the ops' fake kernels; neither version does so with
  `torch.distributed`, and tracing without them fails.
- Fused attention's ops are called by their own names: `scaled_dot_product_attention` keeps their random state to
  itself. The same in both versions.

Compiling goes by the public `torch.compile`; its backend is Inductor's entry under two settings of AOTAutograd that
have no public name, and its errors have none either. All are the same in both versions, and imported when first used,
which takes seconds.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed import _functional_collectives
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from autopar.codegen.stand_in import received

ATTENTION = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""Torch's attention kernels, those first that are usually quicker; the formula last."""
_OPS = torch.ops._c10d_functional
_ATEN = torch.ops.aten


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of `x` over the ranks of `group`, in the shape of `x`."""
    return _wait(_OPS.all_reduce(x, "sum", group)) if group else received(x, x.shape)


def all_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    """The contiguous `x` of every rank, concatenated on dim 0 in rank order: (n, …) to (ranks * n, …)."""
    if not group:
        return received(x, (ranks * x.shape[0], *x.shape[1:]))
    return _wait(_OPS.all_gather_into_tensor(x, ranks, group))


def reduce_scatter(x: Tensor, ranks: int, group: str) -> Tensor:
    """This rank's part on dim 0 of the sum of the contiguous `x`: (ranks * n, …) to (n, …)."""
    if not group:
        return received(x, (x.shape[0] // ranks, *x.shape[1:]))
    return _wait(_OPS.reduce_scatter_tensor(x, "sum", ranks, group))


def all_to_all(x: Tensor, ranks: int, group: str) -> Tensor:
    """Row r of the contiguous `x` (ranks, …) goes to rank r; row r of the result came from rank r."""
    if not group:
        return received(x, x.shape)
    return _wait(_OPS.all_to_all_single(x, [1] * ranks, [1] * ranks, group))


def unaliased(x: Tensor) -> Tensor:
    """`x`, while tracing a copy.

    What an autograd function returns must not share its input's memory in a traced program: AOTAutograd rebuilds
    outputs that alias inputs as views, and Dynamo on 2.11 does so with narrowed ones, both without the function's
    backward and without a word. Inductor drops the copies that turn out to be no output.
    """
    return x.clone() if _functional_collectives._are_we_tracing() else x


def only_if(here: bool, x: Tensor) -> Tensor:
    """`x` if it counts on this rank, else zeros; contiguous.

    Traced programs read `x` on all ranks: where nothing does, the collectives that made it would be dropped as dead
    code, and other ranks would wait in theirs.
    """
    if _functional_collectives._are_we_tracing():
        counts = torch.full((), here, dtype=torch.bool, device=x.device)
        return torch.where(counts, x, torch.zeros((), dtype=x.dtype, device=x.device)).contiguous()
    return x.contiguous() if here else torch.zeros_like(x, memory_format=torch.contiguous_format)


def _wait(x: Any) -> Tensor:
    finished: Tensor = _OPS.wait_tensor(x)
    return finished


def start_all_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    """As `all_gather`, whose result is there after `finish`."""
    return _OPS.all_gather_into_tensor(x, ranks, group)  # type: ignore[no-any-return]


def start_reduce_scatter(x: Tensor, ranks: int, group: str) -> Tensor:
    """As `reduce_scatter`, whose result is there after `finish`."""
    return _OPS.reduce_scatter_tensor(x, "sum", ranks, group)  # type: ignore[no-any-return]


def start_all_to_all(x: Tensor, ranks: int, group: str) -> Tensor:
    """As `all_to_all`, whose result is there after `finish`."""
    return _OPS.all_to_all_single(x, [1] * ranks, [1] * ranks, group)  # type: ignore[no-any-return]


def start_all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of `x` over the ranks of `group`, in the memory of `x`; there after `finish`."""
    return _OPS.all_reduce_(x, "sum", group)  # type: ignore[no-any-return]


def finish(x: Tensor) -> Tensor:
    """What was started: the device's work goes on once it is there, on CPUs the call does."""
    return _wait(x)


def keeps_graph() -> bool:
    """Inside of a backward, whether it was asked for with `retain_graph=True`: no public name, the same in both."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def before_groups_end(action: Callable[[], None]) -> None:
    """Run `action` whenever process groups are about to be destroyed.

    NCCL waits in `destroy_process_group` for all graphs that hold its collectives to go, for ever, and torch has no
    place to hang this on: its function is wrapped, under both names that it is called by, in both versions.
    """
    from torch.distributed import distributed_c10d
    plain = distributed_c10d.destroy_process_group

    @functools.wraps(plain)
    def destroy_process_group(*args: Any, **kwargs: Any) -> None:
        action()
        plain(*args, **kwargs)

    distributed_c10d.destroy_process_group = destroy_process_group
    torch.distributed.destroy_process_group = destroy_process_group


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """`target.copy_(source)` for each of them, in few kernels: named as private in both versions."""
    if targets:
        torch._foreach_copy_(targets, sources)
def storage_bytes(reference: StorageWeakRef) -> int:
    """The bytes of a storage, 0 where it is gone."""
    storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return 0 if storage is None else storage.nbytes()


def allocations(act: Callable[[], None]) -> list[int]:
    """Bytes that the CPU's allocator hands out while `act` runs, those it gets back less than 0, one after the other.

    The profiler's own tables sum them up by op; one by one they are in its results alone, in both versions.
    """
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        act()
    inner: Any = profiler.profiler
    found = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    return [int(event.nbytes()) for event in found]


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and a device and no values; its class has no public name."""
    from torch._subclasses import FakeTensor
    return isinstance(tensor, FakeTensor)


def storage_key(tensor: Tensor) -> int:
    """A number that tensors of one storage share, for as long as one of them lives."""
    return StorageWeakRef(tensor.untyped_storage()).cdata  # type: ignore[no-any-return]


def spec_of(tensor: DTensor) -> Any:
    """How a DTensor lies, as torch keeps it."""
    return tensor._spec


def local_of(tensor: DTensor) -> Tensor:
    """This rank's part: `to_local()` makes a node of autograd's graph for it."""
    return tensor._local_tensor


def distributed(local: Tensor, spec: Any) -> DTensor:
    """The DTensor of `spec` whose part here is the contiguous `local`; differentiable in a backward that is itself.

    `DTensor.from_local` works the spec out anew, in eight times the time of the constructor, which is the same in both
    versions.
    """
    if torch.is_grad_enabled():
        return DTensor.from_local(local, spec.mesh, spec.placements, run_check=False, shape=spec.shape,
                                  stride=spec.stride)
    return DTensor(local, spec, requires_grad=False)


def is_watched(optimizer: Optimizer) -> bool:
    """Whether others than this package are called before or after the optimizer's steps.

    Hooks are registered publicly, and told of by nothing; the names are the same in both versions.
    """
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks,
           optimizer_module._global_optimizer_pre_hooks, optimizer_module._global_optimizer_post_hooks)
    return any(not hook.__module__.startswith("autopar.") for hooks in own for hook in hooks.values())


Partition = Callable[[fx.GraphModule, int], tuple[fx.GraphModule, fx.GraphModule]]
"""What cuts a joint graph with so many forward outputs into a forward and a backward."""


def inductor(graph: fx.GraphModule, inputs: list[Any], attention: Sequence[SDPBackend],
             partition: Partition | None = None) -> Callable[..., Any]:
    """A graph that Dynamo traced, its forward and its backward compiled by Inductor; attention is by the first of the
    kernels that takes its operands.

    The backward is compiled along with the forward, where failures can be told by name, rather than when it first
    runs. It does not write over what the forward saved ("donated" it), so that `retain_graph=True` works as ever: to
    leave that to the setting would do if backwards on GPUs, in threads of their own, saw it too. The width of the CPU's
    vectors is set to what would be found, so that it is part of the key of Inductor's cache: code that was written for
    one width and found again where another is used (ATEN_CPU_CAPABILITY) computes something else. Without a
    `partition`, Inductor's own chooses what is kept for the backward.
    """
    from torch._functorch import config
    from torch._guards import TracingContext
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    def donating_nothing(*args: Any, **kwargs: Any) -> Any:
        metadata = TracingContext.get().fw_metadata
        assert metadata is not None, "AOTAutograd describes what it has compiled"
        metadata.bw_donated_idxs = []
        return compile_fx_inner(*args, **kwargs)

    width = getattr(pick_vec_isa(), "bit_width", lambda: None)()
    chosen = {} if partition is None else {"custom_partitioner_fn": _partitioner(partition)}
    with (config.patch(force_non_lazy_backward_lowering=True, donated_buffer=False),
          inductor_config.patch({"cpp.simdlen": width, **chosen}), sdpa_kernel(list(attention), set_priority=True)):
        compiled: Any = compile_fx(graph, inputs, inner_compile=donating_nothing)
    return compiled  # type: ignore[no-any-return]


def _partitioner(partition: Partition) -> Any:
    """`partition` as Inductor takes it, told apart in its cache by what `partition` says it is."""
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class Partitioner(CustomPartitionerFn):
        def __call__(self, gm: fx.GraphModule, joint_inputs: Any,
                     **given: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
            return partition(gm, given["num_fwd_outputs"])

        def uuid(self) -> Any:
            return f"autopar {partition!r}"

        def __reduce__(self) -> Any:
            return _partitioner, (partition,)

    return Partitioner()


def partitioned(run: Callable[..., Any], partition: Partition) -> Callable[..., Any]:
    """`run`, traced when it is first called, its forward and its backward cut by `partition` and run op by op."""
    compilers: Any = importlib.import_module("functorch.compile")
    from torch._functorch import config

    def plain(module: fx.GraphModule, _: Any) -> Any:
        return compilers.make_boxed_func(fx.Interpreter(module).run)

    def cut(joint: fx.GraphModule, _: Any, *, num_fwd_outputs: int, **__: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        return partition(joint, num_fwd_outputs)

    made = compilers.aot_function(run, fw_compiler=plain, bw_compiler=plain, partition_fn=cut)

    def settled(*inputs: Any) -> Any:
        with config.patch(force_non_lazy_backward_lowering=True, donated_buffer=False, enable_autograd_cache=False):
            return made(*inputs)

    return settled


class _Traced(Exception):
    """Carries a joint graph out of AOTAutograd before it compiles it."""


def joint_graph(run: Callable[..., Any], inputs: list[Tensor], fused: bool) -> tuple[fx.GraphModule, int] | None:
    """The forward and the backward of `run` in one graph, and how many of its outputs are the forward's.

    None where nothing is differentiated. `inputs` are on the CPU without values; ops are those that Inductor
    compiles if `fused`, else torch's own.
    """
    compilers: Any = importlib.import_module("functorch.compile")
    from torch._functorch import config

    def stop(joint: fx.GraphModule, _: Any, *, num_fwd_outputs: int, **__: Any) -> Any:
        raise _Traced(joint, num_fwd_outputs)

    table: Any = None
    if fused:
        table = _decompositions()
    try:
        with config.patch(enable_autograd_cache=False):
            compilers.aot_function(lambda *given: tuple(run(*given)), compilers.nop, partition_fn=stop,
                                   decompositions=table)(*inputs)
    except _Traced as found:
        return found.args
    return None


def without_values() -> Any:
    """A context in which tensors have shapes and devices and no values. AOTAutograd takes the loss of meta tensors for
    one without a gradient. It has no public name; the same in both versions."""
    from torch._subclasses import FakeTensorMode
    return FakeTensorMode()


def cut_joint(joint: fx.GraphModule, saved: list[fx.Node], outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward, which returns its `outputs` and what is `saved`, and the backward, which makes the rest again, each
    value just before it is used."""
    from torch._functorch import partitioners
    from torch.utils._ordered_set import OrderedSet
    forward, backward = partitioners._extract_fwd_bwd_modules(
        joint, saved, saved_sym_nodes=[], num_fwd_outputs=outputs, static_lifetime_input_nodes=OrderedSet())
    return forward, partitioners.reordering_to_mimic_autograd_engine(backward)


def unwritten() -> AbstractContextManager[None]:
    """Inside, graphs that are cut from others are written as Python only where they are run."""
    from torch.fx import _lazy_graph_module
    return _lazy_graph_module._use_lazy_graph_module(True)


def _decompositions() -> Any:
    """Inductor's; some of them look into its lowerings without importing those."""
    importlib.import_module("torch._inductor.lowering")
    from torch._inductor.decomposition import select_decomp_table
    return select_decomp_table()


def cut_by_compiler(joint: fx.GraphModule, outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward as Inductor cuts a joint graph, which is left as it is."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    found: tuple[fx.GraphModule, fx.GraphModule] = min_cut_rematerialization_partition(
        fx.GraphModule(joint, _copied(joint.graph)), None, compiler="inductor", num_fwd_outputs=outputs)
    return found


def _copied(graph: fx.Graph) -> fx.Graph:
    """The nodes of `graph` in another; how its inputs were nested is left out, as a copy of that makes torch warn of
    what it does itself."""
    made = fx.Graph()
    found = made.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(found, tuple)
    output, old = found
    made.output(output).meta = copy.copy(old.meta)
    return made


def traced(run: Callable[..., Any], arguments: list[Tensor], keep: Callable[[str, fx.GraphModule], object],
           partition: Callable[..., Any] | None = None) -> list[Tensor]:
    """The results of `run(*arguments)`, traced by AOTAutograd with Inductor's decompositions.

    Its forward and, once that runs, its backward are given to `keep`, parted by `partition` or as Inductor does.
    `aot_function` has no public name; the same in both versions.
    """
    from functools import partial

    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.aot_autograd import make_boxed_func as boxed  # type: ignore[attr-defined]
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def kept(name: str) -> Any:
        def compiler(graph: fx.GraphModule, _: Any) -> Any:
            keep(name, graph)
            return boxed(graph.forward)
        return compiler

    made = aot_function(lambda *inputs: tuple(run(*inputs)), fw_compiler=kept("forward"), bw_compiler=kept("backward"),
                        partition_fn=partition or partial(min_cut_rematerialization_partition, compiler="inductor"),
                        decompositions=_decompositions(), keep_inference_input_mutations=True)
    return list(made(*arguments))


def compiler_errors() -> tuple[type[Exception], ...]:
    """What Dynamo, AOTAutograd and Inductor raise when they can't compile."""
    from torch._dynamo import exc
    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


def triton_is_usable() -> bool:
    """Whether Triton is installed and knows this machine's devices."""
    from torch.utils._triton import has_triton
    return has_triton()


@dataclass(frozen=True, slots=True)
class Kernel:
    """A fused attention kernel: `forward(query, key, value, bias, rate, causal, scale)` gives the result, the scores'
    logarithmic sums and two parts of random state; `backward(gradient, query, key, value, bias, those four, rate,
    causal, scale)` the gradients of query, key and value. The ops have no public name that gives or takes the state.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _flash(query: Tensor, key: Tensor, value: Tensor, _: None, rate: float, causal: bool,
           scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _ATEN._scaled_dot_product_flash_attention(query, key, value, rate, causal, False, scale=scale)
    return made[0], made[1], made[6], made[7]


def _flash_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, _: None, made: tuple[Tensor, ...],
                    rate: float, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    out, sums, *state = made
    found = _ATEN._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, out, sums, None, None, query.shape[2], key.shape[2], rate, causal, *state,
        scale=scale)
    return found[0], found[1], found[2]


def _efficient(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, rate: float, causal: bool,
               scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _ATEN._scaled_dot_product_efficient_attention(query, key, value, bias, True, rate, causal, scale=scale)
    return made[0], made[1], made[2], made[3]


def _efficient_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor,
                        made: tuple[Tensor, ...], rate: float, causal: bool,
                        scale: float) -> tuple[Tensor, Tensor, Tensor]:
    found = _ATEN._scaled_dot_product_efficient_attention_backward(
        gradient, query, key, value, bias, *made, rate, [True, True, True, False], causal, scale=scale)
    return found[0], found[1], found[2]


FLASH = Kernel(_flash, _flash_backward)
MEMORY_EFFICIENT = Kernel(_efficient, _efficient_backward)


def fused_attention(kind: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
                    enable_gqa: bool = False) -> Tensor:
    """What attention runs on a device of `kind`, on meta too: which kernel that is, torch decides by the device.

    On meta it takes the formula that makes all scores.
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    mask, rate, causal, scale = attn_mask, dropout_p, is_causal, scale or query.shape[-1] ** -0.5
    if kind == "cpu" and rate == 0.0 and (mask is None or not mask.requires_grad):
        bias = mask if mask is None or mask.dtype != torch.bool else torch.zeros_like(mask, dtype=query.dtype)
        found: Tensor = _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, rate, causal,
                                                                          attn_mask=bias, scale=scale)[0]
        return found
    if kind == "cuda" and query.dtype != torch.float32:
        return FLASH.forward(query, key, value, None, rate, causal, scale)[0] if mask is None else (
            MEMORY_EFFICIENT.forward(query, key, value, mask.to(query.dtype), rate, causal, scale)[0])
    plain: Tensor = _ATEN.scaled_dot_product_attention(query, key, value, mask, rate, causal, scale=scale)
    return plain
