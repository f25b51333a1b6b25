"""The property of the rule table: whatever strategy an op takes, its shards recombine to the whole op.

Each case calls one op. For every assignment of every mesh the op is lowered for all ranks and run on them, forward and
backward, from whole operands to whole results, so that a spec which is wrong about a value or about its gradient shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.core.mesh import Mesh
from autopar.passes.capture import COMPUTE_DTYPE, capture
from autopar.passes.decision import Context, Decision, context
from autopar.passes.modes import MODES
from autopar.passes.ops import Op
from autopar.passes.rules.nodes import call_of
from autopar.passes.rules.table import RULES
from autopar.passes.segments import annotate
from autopar.passes.strategies import assignments, storages
from tests.passes.rules import layer_cases, loss_cases, moving_cases
from tests.passes.rules.cases import Case, b, case, i, mask, w, x
from tests.programs import Call, annotated, prepared
from tests.simulator import Trial, assert_same, everything_differentiable, reference, simulated

aten = torch.ops.aten
MESHES = (Mesh((2,)), Mesh((4,)), Mesh((2, 2)))
TOLERANCE = 1e-9
def linear_cases() -> Iterator[Any]:
    op = aten.linear.default
    yield case("linear", "e0 k n", op, F.linear, x(4, 8), w(4, 8))
    yield case("linear with bias", "e0 k n", op, F.linear, x(4, 8), w(4, 8), w(4))
    yield case("linear 3 dims", "e0 e1 k n", op, F.linear, x(4, 4, 8), w(4, 8))
    yield case("linear 3 dims with bias", "e0 e1 k n", op, F.linear, x(4, 3, 8), w(4, 8), w(4))
    yield case("linear of inputs", "e0 k n", op, F.linear, x(4, 8), x(8, 8), x(8))
    yield case("linear of a vector", "k n", op, F.linear, x(8), w(4, 8), w(4))
    yield case("mm", "m k n", aten.mm.default, torch.mm, x(4, 8), w(8, 4))
    yield case("mm with itself", "m k n", aten.mm.default, lambda t: torch.mm(t, t), x(4, 4))
    yield case("bmm", "b m k n", aten.bmm.default, torch.bmm, x(4, 4, 8), x(4, 8, 4))
    yield case("einsum", "b h i d j", aten.einsum.default, lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
               x(4, 4, 4, 8), x(4, 4, 8, 8))
    yield case("einsum of weights", "b s d h e", aten.einsum.default,
               lambda o, v: torch.einsum("b s d, h d e -> b h s e", o, v), x(4, 8, 4), w(4, 4, 8))
    yield case("einsum of three", "a b c d", aten.einsum.default, lambda o, v, u: torch.einsum("ab,bc,cd->ad", o, v, u),
               x(4, 8), w(8, 4), w(4, 8))
    yield case("sum of all", "i0 i1", aten.sum.default, torch.sum, x(4, 8))
    yield case("addmm", "m k n", aten.addmm.default, torch.addmm, w(4), x(4, 8), w(8, 4))
    yield case("addmm of a matrix", "", aten.addmm.default, torch.addmm, x(4, 4), x(4, 8), w(8, 4))
    yield case("addmm scaled", "", aten.addmm.default, lambda *o: torch.addmm(*o, beta=0.5, alpha=2.0), w(4), x(4, 8),
               w(8, 4))


def matmul_cases() -> Iterator[Any]:
    op = aten.matmul.default
    yield case("matmul of matrices", "e0 k n", op, torch.matmul, x(4, 8), w(8, 4))
    yield case("matmul of a batch and a matrix", "e0 e1 k n", op, torch.matmul, x(4, 4, 8), w(8, 4))
    yield case("matmul of batches", "e0 m k n", op, torch.matmul, x(4, 3, 8), x(4, 8, 4))
    yield case("matmul of heads", "e0 e1 m k n", op, torch.matmul, x(4, 4, 3, 8), x(4, 4, 8, 3))
    yield case("matmul of a matrix and a batch", "b m k n", aten.bmm.default, torch.matmul, w(4, 8), x(4, 8, 4))
    yield case("matmul that broadcasts", "b m k n", aten.bmm.default, torch.matmul, x(1, 4, 8), x(4, 8, 4))
    yield case("matmul with a vector", "m k", aten.mv.default, torch.matmul, x(4, 8), w(8))


def convolution_cases() -> Iterator[Any]:
    one, two = aten.conv1d.default, aten.conv2d.default
    yield case("conv1d", "n c o", one, F.conv1d, x(4, 4, 6), w(4, 4, 3))
    yield case("conv1d with bias and padding", "n c o", one, lambda *o: F.conv1d(*o, padding=1), x(4, 4, 8), w(4, 4, 3),
               w(4))
    yield case("conv2d", "n c o", two, F.conv2d, x(4, 4, 5, 5), w(4, 4, 3, 3))
    yield case("conv2d with bias", "n c o", two, lambda *o: F.conv2d(*o, padding=1), x(4, 4, 8, 8), w(4, 4, 3, 3), w(4))
    yield case("conv2d strided", "n c o", two, lambda *o: F.conv2d(*o, stride=2, padding=1), x(4, 4, 8, 8),
               w(8, 4, 3, 3))
    yield case("conv2d dilated", "n c o", two, lambda *o: F.conv2d(*o, dilation=2), x(4, 3, 6, 6), w(4, 3, 2, 2))
    yield case("conv2d in groups", "n", two, lambda *o: F.conv2d(*o, groups=2), x(4, 4, 5, 5), w(4, 2, 3, 3), w(4))
    yield case("conv2d by channel", "n", two, lambda *o: F.conv2d(*o, groups=4), x(4, 4, 5, 5), w(4, 1, 3, 3))


def norm_cases() -> Iterator[Any]:
    op, batch = aten.layer_norm.default, aten.batch_norm.default
    yield case("layer_norm", "e0 e1", op, lambda t, *o: F.layer_norm(t, (8,), *o), x(4, 4, 8), w(8), w(8))
    yield case("layer_norm without bias", "e0", op, lambda t, *o: F.layer_norm(t, (8,), *o), x(4, 8), w(8))
    yield case("layer_norm plain", "e0", op, lambda t: F.layer_norm(t, (8,)), x(4, 8))
    yield case("layer_norm over two dims", "e0", op, lambda t, *o: F.layer_norm(t, (4, 8), *o), x(4, 4, 8), w(4, 8),
               w(4, 8))

    def norm(training: bool) -> Callable[..., Tensor]:
        def call(t: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
            return F.batch_norm(t, mean, variance, weight, bias, training, 0.3)
        return call

    running = w(4), w(4), b(4), b(4)
    yield case("batch_norm in training", "n c", batch, norm(True), x(4, 4, 4, 4), *running)
    yield case("batch_norm in evaluation", "n c", batch, norm(False), x(4, 4, 4, 4), *running)
    yield case("batch_norm of vectors", "n c", batch, norm(True), x(8, 4), *running)
    yield case("batch_norm plain", "n c", batch, lambda t, *r: F.batch_norm(t, *r, training=True), x(4, 4, 4), b(4),
               b(4))
    yield case("batch_norm without running statistics", "n c", batch,
               lambda t, *o: F.batch_norm(t, None, None, *o, training=True), x(4, 4, 4), w(4), w(4))


def attention_cases() -> Iterator[Any]:
    op, qkv = aten.scaled_dot_product_attention.default, (x(4, 4, 4, 12), x(4, 4, 8, 12), x(4, 4, 8, 16))
    call, square = F.scaled_dot_product_attention, (x(4, 4, 8, 4),) * 3

    def attention(**options: Any) -> Callable[..., Tensor]:
        return lambda *o: call(*o, **options)

    yield case("attention", "b h", op, call, *qkv)
    yield case("attention to itself", "b h", op, lambda t: call(t, t, t), x(4, 4, 8, 4))
    yield case("attention scaled", "b h", op, attention(scale=0.3), *qkv)
    yield case("attention causal", "b h", op, attention(is_causal=True), *square)
    yield case("attention causal scaled", "b h", op, attention(is_causal=True, scale=2.0), *square)
    yield case("attention masked", "b h", op, call, *qkv, mask(4, 1, 4, 8))
    yield case("attention masked by head", "b h", op, call, *qkv, mask(1, 4, 4, 8))
    yield case("attention masked alike", "b h", op, call, *qkv, mask(4, 8))
    yield case("attention with bias", "b h", op, call, *qkv, x(4, 4, 4, 8))
    yield case("attention with one bias", "b h", op, call, *qkv, x(1, 1, 4, 8))
    yield case("attention with a bias that broadcasts keys", "b h", op, call, *qkv, x(4, 1, 4, 1))
    yield case("attention with dropout 0", "b h", op, attention(dropout_p=0.0), *qkv)
    yield case("attention with dropout", "b h", op, attention(dropout_p=0.4), *qkv, random=True)
    yield case("attention causal with dropout", "b h", op, attention(dropout_p=0.4, is_causal=True), *square,
               random=True)
    yield case("attention masked with dropout", "b h", op, attention(dropout_p=0.4), *qkv, mask(4, 1, 4, 8),
               random=True)
    yield case("attention in groups", "b h_0 h_1", op, attention(enable_gqa=True), x(4, 4, 4, 8),
               *(x(4, 2, 4, 8),) * 2)
    yield case("attention of 3 dims", "", op, call, *(x(4, 8, 4),) * 3)


def shape_cases() -> Iterator[Any]:
    yield case("cat", "o0 o2", aten.cat.default, lambda *o: torch.cat(o, 1), x(4, 3, 4), x(4, 2, 4))
    yield case("cat along the batch", "o1", aten.cat.default, lambda *o: torch.cat(o), x(4, 4), x(2, 4), w(2, 4))
    yield case("cat of one", "o0", aten.cat.default, lambda o: torch.cat([o], -1), x(4, 4))
    yield case("slice", "o0 o2", aten.slice.Tensor, lambda t: t[:, 1:3], x(4, 8, 4))
    yield case("slice with a step", "o0 o1", aten.slice.Tensor, lambda t: t[:, :, ::2], x(4, 4, 8))
    yield case("slice of the batch", "o1", aten.slice.Tensor, lambda t: t[1:], x(5, 4))
    yield case("select", "o0 o2", aten.select.int, lambda t: t[:, 1], x(4, 8, 4))
    yield case("select from the back", "o0 o1", aten.select.int, lambda t: t.select(-1, -1), x(4, 8, 4))
    yield case("pad", "o0 o1", aten.pad.default, lambda t: F.pad(t, (1, 2)), x(4, 4, 4))
    yield case("pad two dims", "o0 o2", aten.pad.default, lambda t: F.pad(t, (0, 0, 1, 1), value=3.0), x(4, 4, 4))
    yield case("expand", "o0 o1 o2", aten.expand.default, lambda t: t.expand(-1, 4, -1), x(4, 1, 4))
    yield case("expand to more dims", "o0 o1 o2", aten.expand.default, lambda t: t.expand(4, 3, 8), w(8))
    yield case("slice_scatter", "o0 o2", aten.slice_scatter.default, lambda t, p: torch.slice_scatter(t, p, 1, 2, 4),
               x(4, 8, 4), w(4, 2, 4))
    yield case("slice_scatter of all", "o0", aten.slice_scatter.default, lambda t, p: torch.slice_scatter(t, p, 1),
               x(4, 8), x(4, 8))
    yield case("select_scatter", "o0 o2", aten.select_scatter.default, lambda t, p: torch.select_scatter(t, p, 1, -2),
               x(4, 8, 4), x(4, 4))
    yield case("roll", "o0 o2", aten.roll.default, lambda t: t.roll(3, 1), x(4, 8, 4))
    yield case("roll of two dims", "o1", aten.roll.default, lambda t: t.roll((1, 2), (0, -1)), x(4, 4, 8))
    yield case("roll of the flat tensor", "", aten.roll.default, lambda t: t.roll(3), x(4, 8))
    yield case("to", "o0 o1", aten.to.dtype, lambda t: t.to(torch.float32), x(4, 4))
    yield case("to of integers", "o0 o1", aten.to.dtype, lambda t: t.to(torch.float64), i(9, 4, 4))


def reduction_cases() -> Iterator[Any]:
    names = {aten.mean.dim: torch.mean, aten.sum.dim_IntList: torch.sum, aten.amax.default: torch.amax}
    for (op, call), keep in itertools.product(names.items(), (False, True)):
        kept, sums = " kept" if keep else "", op is aten.sum.dim_IntList
        def of(dims: Any, call: Any = call, keep: bool = keep) -> Callable[[Tensor], Tensor]:
            return lambda t: call(t, dims, keep)
        yield case(f"{call.__name__} of the last{kept}", "o0 o1" + " o2" * sums, op, of(-1), x(4, 4, 4))
        yield case(f"{call.__name__} of two{kept}", "o0 o1 o2" if sums else "o1", op, of((0, 2)), x(4, 4, 4))


def pointwise_cases() -> Iterator[Any]:
    yield case("add", "o0 o1", aten.add.Tensor, torch.add, x(4, 4), x(4, 4))
    yield case("add scaled", "o0 o1", aten.add.Tensor, lambda *o: torch.add(*o, alpha=3), x(4, 4), w(4))
    yield case("broadcast rows", "o0 o1 o2", aten.mul.Tensor, torch.mul, x(4, 3, 4), w(4))
    yield case("broadcast columns", "o0 o1", aten.mul.Tensor, torch.mul, x(4, 4), x(4, 1))
    yield case("broadcast both ways", "o0 o1 o2", aten.div.Tensor, torch.div, x(4, 1, 4), x(1, 4, 4))
    yield case("broadcast a scalar", "o0 o1", aten.mul.Tensor, torch.mul, x(4, 4), w())
    yield case("square", "o0 o1", aten.mul.Tensor, lambda t: t * t, x(4, 4))
    yield case("gelu", "o0 o1", aten.gelu.default, F.gelu, x(4, 4))
    yield case("where", "o0 o1", aten.where.self, torch.where, mask(4, 1), x(4, 4), x(4))
    yield case("where with a number", "o0 o1", aten.where.ScalarOther, lambda m, t: torch.where(m, t, 2.0), mask(1, 4),
               x(4, 4))
    yield case("masked_fill", "o0 o1", aten.masked_fill.Scalar, lambda t, m: t.masked_fill(m, 2.0), x(4, 4), mask(4, 4))
    yield case("rand", "o0 o1", aten.rand.default, lambda t: t * torch.rand(4, 4, device=t.device), x(4, 4),
               random=True)
    yield case("dropout", "o0 o1 o2", aten.dropout.default, lambda t: F.dropout(t, 0.4), x(4, 4, 4), random=True)


def rms_norm(t: Tensor, weight: Tensor) -> Tensor:
    return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotary(t: Tensor, angle: Tensor) -> Tensor:
    half = t.shape[-1] // 2
    return t * angle.cos() + torch.cat((-t[..., half:], t[..., :half]), -1) * angle.sin()


def gated(t: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    scores = (t * gate).softmax(1)
    return scores.sin(), scores.amax(1)


def cluster_cases() -> Iterator[Any]:
    """Ops of several nodes; their factors are numbered as they come."""
    mul, keep = aten.mul.Tensor, F.dropout
    yield case("a chain", "f0 f1", mul, lambda m, n, t: t * (m & n), mask(4, 1), mask(1, 4), x(4, 4))
    yield case("a chain with two results", "f0 f1", aten.sin.default, lambda t, v: (h := t * v + v, h.sin()), x(4, 4),
               w(4))
    yield case("a chain with dropout", "f0 f1", mul, lambda t: t.sin() * keep(t.cos(), 0.4), x(4, 4), random=True)
    yield case("a norm", "f0 f1", mul, rms_norm, x(4, 4, 8), w(8))
    yield case("a rotary embedding", "f0 f1 f3", aten.add.Tensor, rotary, x(4, 4, 4, 8), x(4, 1, 4, 8))
    yield case("results of two shapes", "f0 f2", aten.amax.default, gated, x(4, 4, 4), w(4, 1))
    yield case("a sum within", "f0", mul, lambda t, v: t / t.exp().sum(-1, keepdim=True) * v, x(4, 8), w(8))
    yield case("a shift within", "f1", aten.add.Tensor, lambda t, v: t + (t * v).roll(1, 0), x(4, 8), w(8))
    yield case("a scatter within", "f0", aten.slice_scatter.default,
               lambda t, v: torch.slice_scatter(t * v, (t + v)[:, :4], 1, 2, 6), x(4, 8), w(8))
    yield case("a choice of rows", "f0 f1 f2", aten.where.self,
               lambda m, t, v: torch.where(m, t.expand(4, 4, 4), t * v), mask(4, 1, 4), x(1, 4, 4), w(4))
    yield case("the same factor twice", "o0 o1", mul, lambda t: t @ t.t() * (t @ t.t()).softmax(-1), x(4, 8))


def other_cases() -> Iterator[Any]:
    embed = aten.embedding.default
    yield case("embedding", "v d e0 e1", embed, lambda t, v: F.embedding(t, v), i(8, 4, 3), w(8, 8))
    yield case("embedding with padding", "v d e0 e1", embed, lambda t, v: F.embedding(t, v, 5), i(8, 4, 4), w(8, 8))
    yield case("embedding with an input for table", "v_0 v_1 d e0", embed,
               lambda t, v: F.embedding(t, v.reshape(16, 4)), i(16, 4), x(4, 4, 4))
    yield case("embedding by frequency", "", embed, lambda t, v: F.embedding(t, v, scale_grad_by_freq=True), i(3, 8),
               w(3, 8))
    yield case("softmax", "o0 o1", aten.softmax.int, lambda t: t.softmax(-1), x(4, 4, 4))
    yield case("softmax in front", "o1", aten.softmax.int, lambda t: t.softmax(0), x(4, 4))
    yield case("log_softmax", "o0 o2", aten.log_softmax.int, lambda t: t.log_softmax(1), x(4, 4, 8))
    yield case("max_pool2d", "n c", aten.max_pool2d.default, lambda t: F.max_pool2d(t, 3, 2, 1), x(4, 4, 6, 6))
    yield case("avg_pool2d", "n c", aten.avg_pool2d.default, lambda t: F.avg_pool2d(t, 2), x(4, 4, 6, 6))
    yield case("adaptive_avg_pool2d", "n c", aten.adaptive_avg_pool2d.default, lambda t: F.adaptive_avg_pool2d(t, 1),
               x(4, 4, 6, 6))
    yield case("adaptive_avg_pool1d", "n c", aten.adaptive_avg_pool1d.default, lambda t: F.adaptive_avg_pool1d(t, 2),
               x(4, 4, 8))
    yield case("an op without a rule", "", aten.trace.default, torch.trace, x(4, 4))
    yield case("a mean of everything", "i0 i1", aten.sum.default, torch.mean, x(4, 8))


OFTEN = [*linear_cases(), *matmul_cases(), *convolution_cases(), *norm_cases(), *attention_cases(), *shape_cases(),
         *reduction_cases(), *pointwise_cases(), *cluster_cases(), *other_cases(), *loss_cases.CASES]
SELDOM = [*moving_cases.CASES, *layer_cases.CASES]
CASES = [*OFTEN, *SELDOM]
POINTS = [pytest.param(param.values[0], mesh, id=f"{param.id}-{mesh}",
                       marks=pytest.mark.slow if mesh in (MESHES[:2] if param in SELDOM else MESHES[:1]) else ())
          for param, mesh in itertools.product(CASES, MESHES)]
"""A mesh of two axes has the assignments of one among its own, with the other axis idle; axes of four are for the ops
that are met often."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A captured case with its operands by placeholder, in the order of the call; `known` are constants besides."""

    context: Context
    given: dict[str, Tensor]
    known: dict[str, Tensor]
    place: int

    @property
    def op(self) -> Op:
        """The op that the case is about, the last of its kind."""
        return self.context.segmented.ops[self.place]


@cache
def captured(case: Case) -> Subject:
    generator = torch.Generator().manual_seed(0)
    operands = [make(generator) for make in case.operands]
    module = Call(case.call, operands)
    inputs = tuple(o for o, name in zip(operands, module.held, strict=True) if not name)
    program = prepared(capture(module, (inputs, {}), "fp64"))  # type: ignore[arg-type]
    placeholder = {program.sources[n.name].name: n.name for n in program.graph.nodes if n.op == "placeholder"}
    rest = iter(program.placeholders("input"))
    names = [placeholder.get(name) if name else next(rest).name for name in module.held]
    given = {name: operand.detach() for name, operand in zip(names, operands, strict=True) if name}
    found = everything_differentiable(context(annotate(program)))
    place = max(i for i, op in enumerate(found.segmented.ops) if call_of(op.main).target is case.op)
    return Subject(found, given, program.constants, place)


def decisions(subject: Subject, mesh: Mesh) -> Iterator[Decision]:
    """Every assignment of the case's op, its parameters resting in one way after another, other ops idle."""
    idle = ("R",) * len(mesh.shape)
    ways = {node: itertools.cycle(storages(subject.context.segmented.factored, node, users, mesh, MODES["auto"]))
            for node, users in subject.context.parameters().items()}
    for assignment in [*assignments(subject.op, mesh, MODES["auto"], True), ("G",) * len(mesh.shape)]:
        stored = {node: next(storage) for node, storage in ways.items()}
        every = (assignment if i == subject.place else idle for i in range(len(subject.context.segmented.ops)))
        yield Decision(subject.context, mesh, tuple(every), stored)


@cache
def wanted(case: Case) -> Trial:
    """What the plain op does; one that draws random numbers is its own reference, whole on one device."""
    subject = captured(case)
    if not case.random:
        return reference(subject.context, case.call, subject.given)
    return simulated(next(decisions(subject, Mesh((1,)))), subject.given | subject.known)


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPUTE_DTYPE, "fp64", torch.float64)


@pytest.mark.parametrize(("case", "mesh"), POINTS)
def test_shards_recombine_to_the_whole(case: Case, mesh: Mesh) -> None:
    subject = captured(case)
    for decision in decisions(subject, mesh):
        try:
            assert_same(simulated(decision, subject.given | subject.known), wanted(case), TOLERANCE)
        except Exception as failure:
            stored = {node.name: str(storage) for node, storage in decision.storage.items()}
            taken = decision.assignments[subject.place]
            raise AssertionError(f"under {taken}, stored {stored}: {failure}") from failure


@pytest.mark.parametrize("case", CASES)
def test_factors_that_may_be_sharded(case: Case) -> None:
    assert {f.key for f in captured(case).op.factors if f.shardable} == set(case.factors.split())


def test_a_table_of_positions_is_cut_by_columns_only() -> None:
    found = annotated(lambda v: F.embedding(torch.arange(4), v), nn.Parameter(torch.randn(8, 8)))
    assert {f.key for f in found.segmented.ops[-1].factors if f.shardable} == {"d", "e0"}


def test_every_rule_has_a_case() -> None:
    assert not {str(op) for op in RULES} - {str(param.values[0].op) for param in CASES}
