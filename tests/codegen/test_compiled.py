"""Segments compiled by Inductor: each distinct one once, and steps as exact as eager ones."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import autopar
from autopar.codegen import private
from autopar.codegen.attending import Chosen
from autopar.codegen.compiled import CompiledSegment, Compiler, Progress, compiler_for
from autopar.codegen.executable import Executable
from autopar.core.errors import AutoparError
from tests.builders import Case, gpt2, mlp, quick, resnet
from tests.codegen.test_parameters import any_plan
from tests.families import as_written, family
from tests.pool import Pool
from tests.test_exactness import TOLERANCE, gradient_errors, whole

MODELS: dict[str, Callable[[], Case]] = {
    "mlp": mlp, "gpt2": gpt2, "resnet": resnet, "bert": lambda: family("bert"), "llama": lambda: family("llama"),
    "gpt2 with dropout": lambda: gpt2(dropout=0.1), "bert with dropout": lambda: as_written("bert")}


PATIENCE = 900.0
"""Seconds: Inductor takes a minute and more for the C++ of some models, and others may want the processor too."""


@pytest.fixture(scope="module")
def patient() -> Iterator[Callable[[int], Pool]]:
    """As `pool`, with more time for one run."""
    pools: dict[int, Pool] = {}

    def get(world_size: int) -> Pool:
        return pools.setdefault(world_size, Pool(world_size, PATIENCE))

    yield get
    for started in pools.values():
        started.close()


def made(case: Case, world_size: int, compiler: Compiler, **options: Any) -> nn.Module:
    """A copy of the case's model, the seed of its dropout always the same."""
    torch.manual_seed(5)
    return autopar.compile(copy.deepcopy(case.model), quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn,
                           compiler=compiler, **{"precision": "fp32", **options})


def counts(executable: Executable) -> tuple[int, int]:
    """How many compilations there have been, and how many distinct segments there are."""
    runs = {id(call.run): call.run for call in executable.calls}
    assert all(isinstance(run, CompiledSegment) for run in runs.values())
    lowered = {id(call.lowered) for call in executable.calls}
    return sum(run.compilations for run in runs.values()), len(lowered)  # type: ignore[attr-defined]


def plain_step(case: Case) -> tuple[float, nn.Module]:
    """The loss of the plain model, and the model with its gradients."""
    loss = case.plain_loss(case.model)
    loss.backward()
    return float(loss.detach()), case.model


def eager_step(case: Case, world_size: int, options: dict[str, Any]) -> tuple[float, nn.Module]:
    """The loss of a model that runs uncompiled, and the plain model with that one's gradients and buffers.

    For models with dropout, whose masks the plain model draws otherwise.
    """
    model = made(case, world_size, "eager", **options)
    loss = case.call(model)
    loss.backward()
    plain = case.model
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in plain.named_parameters():
        parameter.grad = gradients[name].reshape(parameter.shape)
    for buffer, moved in zip(plain.buffers(), model.buffers(), strict=True):
        buffer.copy_(moved)
    return float(loss.detach()), plain


@contextlib.contextmanager
def recorded(into: list[list[Any]]) -> Iterator[None]:
    """Inside, the collectives of each graph that Inductor compiles are noted: op, shape, group."""
    from torch._functorch import config
    from torch._inductor import compile_fx
    inner = compile_fx.compile_fx_inner

    def noting(graph: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        nodes = [n for n in graph.graph.nodes if "_c10d_functional" in str(n.target) and "wait" not in str(n.target)]
        into.append([(str(n.target), tuple(n.meta["val"].shape), n.args[-1]) for n in nodes])
        return inner(graph, *args, **kwargs)

    compile_fx.compile_fx_inner = noting
    try:
        with config.patch(enable_autograd_cache=False):  # what is found there is not compiled
            yield
    finally:
        compile_fx.compile_fx_inner = inner


def in_axes(graphs: list[list[Any]], model: nn.Module) -> list[list[Any]]:
    """Collectives with the axes of their groups, whose names differ between ranks."""
    groups = model._site.communicator.groups
    axes = {group.name: axes for axes, group in reversed(groups.items())}
    return [[(op, shape, axes[name]) for op, shape, name in graph] for graph in graphs]


def check(rank: int, world_size: int, name: str, options: dict[str, Any]) -> tuple[float, float, float, Any, Any]:
    """(loss error, worst gradient error, worst buffer error, counts, collectives) of a step that was compiled before.

    The first step compiles; the second one starts from the same state and has to do the same.
    """
    case, graphs = MODELS[name](), []
    model = made(case, world_size, "inductor", **options)
    state, drawn = copy.deepcopy(model.state_dict()), model.random_state()
    with recorded(graphs):
        first = case.call(model)
    first.backward()
    model.zero_grad()
    model.load_state_dict(state)
    model.set_random_state(drawn)
    loss = case.call(model)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    step = eager_step(case, world_size, options) if "dropout" in name else plain_step(case)
    buffers = zip(model.named_buffers(), step[1].named_buffers(), strict=True)
    moved = max((float((b.float() - r.float()).abs().max()) for (_, b), (_, r) in buffers), default=0.0)
    assert float(first.detach()) == float(loss.detach())
    (executable,) = model._batches.known.values()
    return (abs(float(loss.detach()) - step[0]), max(gradient_errors(model, step[1]).values()), moved,
            counts(executable), in_axes(graphs, model))


@pytest.mark.dist
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize(("name", "world_size", "options"), [
    pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("mlp", 2, {"mode": "zero3"}),
        ("gpt2 with dropout", 2, {"mode": "zero2"}), ("gpt2 with dropout", 2, {"mode": "1d"}),
        ("resnet", 2, {"mode": "ddp"}), ("bert", 2, {"mode": "sequence"}), ("bert with dropout", 2, {"mode": "auto"}),
        ("llama", 2, {"mode": "auto"}), ("gpt2", 4, {"mode": "zero+1d", "mesh": (2, 2)}),
        ("gpt2", 4, {"mode": "2d", "mesh": (2, 2)})]
], ids=str)
def test_a_compiled_step_is_the_plain_models(patient: Any, name: str, world_size: int,
                                             options: dict[str, Any]) -> None:
    found = patient(world_size).run(check, name, options)
    for loss_error, gradient_error, buffer_error, (compiled, distinct), collectives in found:
        assert loss_error <= TOLERANCE
        assert gradient_error <= TOLERANCE
        assert buffer_error <= TOLERANCE
        assert compiled == distinct
        assert len(collectives) == 2 * distinct
        assert collectives == found[0][-1], "ranks would wait in different collectives"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("seed", [1, 2])
def test_any_plan_has_the_same_collectives_on_all_ranks(patient: Any, seed: int) -> None:
    """Among them plans in which a value counts on some ranks and is zeros on others."""
    plan = any_plan(mlp(), (2, 2), seed)
    test_a_compiled_step_is_the_plain_models(patient, "mlp", 4, {"plan": plan})


def loop(model: nn.Module, case: Case, call: Callable[[nn.Module], Tensor]) -> list[float]:
    """Losses and gradient norms of steps of two accumulated batches, an evaluation after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(2):
        model.train()
        for retain in (True, False):
            loss = call(model)
            loss.backward(retain_graph=retain)
            found.append(float(loss.detach()))
        grads = [whole(p.grad) for p in model.parameters() if p.grad is not None]
        found.append(float(torch.stack([g.square().sum() for g in grads]).sum().sqrt()))
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            found.append(float(call(model)))
    return found


def looped(rank: int, world_size: int, options: dict[str, Any]) -> tuple[list[float], list[float], list[Any]]:
    """The loop of a compiled model and of the plain one, and the counts of the compiled one's programs."""
    case = mlp()
    model = made(case, world_size, "inductor", **options)
    found = loop(model, case, case.call)
    return found, loop(case.model, case, case.plain_loss), [counts(e) for e in model._batches.known.values()]


@pytest.mark.dist
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize(("options", "tolerance"), [
    ({"mode": "1d"}, TOLERANCE), pytest.param({"mode": "zero3"}, TOLERANCE, marks=pytest.mark.slow),
    pytest.param({"mode": "zero2", "precision": "bf16-mixed"}, 2e-2, marks=pytest.mark.slow),
], ids=str)
def test_a_loop_with_accumulation_and_evaluation(patient: Any, options: dict[str, Any], tolerance: float) -> None:
    for found, expected, (training, evaluation) in patient(2).run(looped, options):
        assert found == pytest.approx(expected, abs=tolerance)
        assert training[0] == training[1] and evaluation[0] == evaluation[1]


class Fails(nn.Module):
    """Cannot be traced."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        torch._dynamo.graph_break()
        return (x,)


@torch.library.custom_op("autopar_tests::refuse", mutates_args=())
def refuse(x: Tensor) -> Tensor:
    """Traces well and fails when it runs."""
    raise ValueError("not today")


@refuse.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class FailsLater(nn.Module):
    """Compiles."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (refuse(x),)


def segment(module: nn.Module) -> CompiledSegment:
    """`module` as a segment called h_0."""
    lowered: Any = SimpleNamespace(segment=SimpleNamespace(name="h_0"), module=module)
    return CompiledSegment(lowered, Progress(1), Chosen(lowered.module))


def test_what_can_t_be_compiled_is_told_by_segment_and_remedy() -> None:
    with pytest.raises(AutoparError, match=r"segment h_0 .*Unsupported.*compiler=\"eager\"") as refused:
        segment(Fails())(torch.ones(2))
    assert "\n" not in str(refused.value)
    assert refused.value.__cause__ is not None


def test_what_fails_in_the_backend_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such kernel")
    monkeypatch.setattr(private, "inductor", broken)
    with pytest.raises(AutoparError, match=r"segment h_0 .*no such kernel"):
        segment(nn.Identity())(torch.ones(2))


def test_what_fails_when_it_runs_is_not_blamed_on_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "inductor", lambda graph, *_: graph)
    with pytest.raises(ValueError, match="not today"):
        segment(FailsLater())(torch.ones(2))


def alone(rank: int, world_size: int, where: str) -> list[str]:
    """What a rank is told when rank 1 alone can't compile, and then that all go on without a compiler."""
    def backend(graph: fx.GraphModule, *_: Any) -> Callable[..., Any]:
        if rank == 1 and where == "the backend":
            raise RuntimeError("no compiler here")
        return graph.forward

    def traced(*_: Any, **__: Any) -> Any:
        raise torch._dynamo.exc.Unsupported("no tracing here")

    case, said = mlp(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private, "inductor", backend)
        model = made(case, world_size, "inductor", mode="1d")
        if rank == 1 and where == "the trace":
            patch.setattr(torch, "compile", lambda *_, **__: traced)
        try:
            case.call(model)
        except AutoparError as error:
            said.append(str(error))
    loss = case.call(made(case, world_size, "eager", mode="1d"))
    return [*said, "in step" if abs(float(loss) - plain_step(case)[0]) < TOLERANCE else "out of step"]


@pytest.mark.dist
@pytest.mark.parametrize(("where", "words"), [("the backend", "RuntimeError: no compiler here"),
                                              ("the trace", "Unsupported: no tracing here")])
def test_a_rank_that_alone_can_t_compile_is_told_of_on_all(pool: Any, where: str, words: str) -> None:
    for said, then in pool(2).run(alone, where):
        assert "can't be compiled" in said and words in said and "pass compiler=\"eager\"" in said and then == "in step"


def test_progress_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    progress = Progress(5)
    with caplog.at_level(logging.INFO, "autopar"):
        for seconds in (1.2, 4.0, 6.9):
            progress.one_more(seconds)
    assert caplog.messages[-1] == "compiled 3 of 5 segment classes, 12 s"


@pytest.mark.parametrize(("device", "asked", "usable", "found"), [
    ("cpu", None, False, "eager"), ("cpu", "inductor", False, "inductor"), ("cuda:0", None, True, "inductor"),
    ("cuda:0", None, False, "eager"), ("cuda:0", "eager", True, "eager"), ("cuda:0", "inductor", True, "inductor"),
])
def test_the_compiler_of_a_device(monkeypatch: pytest.MonkeyPatch, device: str, asked: Any, usable: bool,
                                  found: str) -> None:
    monkeypatch.setattr(private, "triton_is_usable", lambda: usable)
    assert compiler_for(torch.device(device), asked) == found


def test_inductor_without_triton_is_refused_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "triton_is_usable", lambda: False)
    with pytest.raises(AutoparError, match=r"cuda:0.*compiler=\"eager\""):
        compiler_for(torch.device("cuda:0"), "inductor")


def test_an_unknown_compiler_is_refused() -> None:
    with pytest.raises(AutoparError, match=r"compiler.*inductor"):
        autopar.compile(mlp().model, compiler="inducter")  # type: ignore[arg-type]
