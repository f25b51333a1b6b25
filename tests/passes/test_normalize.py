"""Normalised programs compute what the module does, with fewer kinds of op and no writes but of buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.core.errors import CaptureError
from autopar.passes.functional import is_update, mutates
from autopar.passes.normalize import Normalize
from tests.programs import Call, evaluated, raw, targets


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def shifted(t: Tensor) -> Tensor:
    new = t.new_zeros(t.shape)
    new[:, 1:] = t[:, :-1].clone()
    new[:, 0] = 7.0
    return new * t


def through_a_view(t: Tensor) -> Tensor:
    new = t * 1.0
    new.view(-1).relu_()
    return new + 1


def seen_by_a_view(t: Tensor) -> Tensor:
    new = t * 1.0
    view = new.view(-1)
    new.relu_()
    return view + 1


def through_a_transpose(t: Tensor) -> Tensor:
    new = t * 1.0
    new.t()[1].mul_(3.0)
    new.permute(1, 0)[0] = 2.0
    return new


def twice(t: Tensor) -> Tensor:
    new = t + 1
    new += t
    new *= t
    return new.add_(1)


def before_and_after(t: Tensor) -> Tensor:
    new = t + 1
    before = new * 2
    new.zero_()
    return before + new


def a_copy_stays(t: Tensor) -> Tensor:
    new = t * 1.0
    kept = new.clone()
    new.neg_()
    return kept + 2 * new


def a_write_between_two_casts(t: Tensor) -> Tensor:
    new = t * 1.0
    same = new.to(torch.float32)
    new.neg_()
    return same.to(torch.float64)


@pytest.mark.parametrize("call", [shifted, through_a_view, seen_by_a_view, through_a_transpose, twice, before_and_after,
                                  a_copy_stays, a_write_between_two_casts])
def test_writes_become_values(call: Callable[[Tensor], Tensor]) -> None:
    operand = x(3, 4)
    found = Normalize()(raw(call, operand))
    assert not any(mutates(n.target) for n in found.graph.nodes)
    found.graph.lint()
    torch.testing.assert_close(evaluated(found, operand), call(operand.clone()))


@pytest.mark.parametrize(("call", "expected"), [
    (lambda t: t.to(torch.float32) + t.to(t.device), ["add"]),
    (lambda t: t.float().to(torch.float64), ["to"]),
    (lambda t: t.double().type_as(t), ["to", "to"]),
    (lambda t: F.dropout(t, 0.0) + F.dropout(t, 0.5, training=False), ["add"]),
    (lambda t: F.dropout(t, 0.5) + F.alpha_dropout(t, 0.0), ["dropout", "add"]),
    (lambda t: (t + 1, torch.sin(t))[0], ["add"]),
    (lambda t: F.relu(t + 1, inplace=True), ["add", "relu"]),
    (lambda t: t.detach() * 2, ["detach", "mul"]),
])
def test_useless_ops_go(call: Callable[[Tensor], Tensor], expected: list[str]) -> None:
    assert targets(Normalize()(raw(call, x(3, 4)))) == expected


def test_casts_say_the_dtype_and_nothing_else() -> None:
    found = Normalize()(raw(lambda t: t.to(dtype=torch.float64, copy=True).to("meta", torch.float16), x(3)))
    casts = [n for n in found.graph.nodes if n.op == "call_function"]
    assert [(n.args[1:], n.kwargs) for n in casts] == [((torch.float64,), {}), ((torch.float16,), {})]


def test_assertions_go() -> None:
    def checked(t: Tensor) -> Tensor:
        torch._assert(t.shape[0] == 3, "three rows")
        return F.relu(t)
    assert targets(Normalize()(raw(checked, x(3, 4)))) == ["relu"]


def test_without_gradient_becomes_detached() -> None:
    def half(t: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            scale = (t * v).sum(-1, keepdim=True)
        return v * scale
    weight = nn.Parameter(x(4))
    found = Normalize()(raw(half, x(3, 4), weight))
    assert "wrap_with_set_grad_enabled" not in str(found.graph)
    result = evaluated(found, x(3, 4), weight)
    result.sum().backward()
    twin = nn.Parameter(weight.detach().clone())
    half(x(3, 4), twin).sum().backward()
    torch.testing.assert_close(result, half(x(3, 4), weight))
    torch.testing.assert_close(weight.grad, twin.grad)


def test_updates_of_buffers_stay() -> None:
    def count(t: Tensor, seen: Tensor) -> Tensor:
        seen.add_(1)
        return t * 2
    found = Normalize()(raw(count, x(3), nn.Buffer(torch.zeros(()))))
    updates = [n for n in found.graph.nodes if is_update(n, found)]
    assert [str(n.target) for n in updates] == ["aten.add_.Tensor"]


def test_batch_norm_stays_whole() -> None:
    norm = nn.BatchNorm2d(3)
    running = [nn.Buffer(norm.running_mean), nn.Buffer(norm.running_var)]
    operands: list[Any] = [x(2, 3, 4, 4), norm.weight, norm.bias, *running]
    found = Normalize()(raw(lambda t, *o: F.batch_norm(t, *o[2:], *o[:2], training=True), *operands))
    assert targets(found) == ["batch_norm"]
    plain = copy.deepcopy(norm)
    torch.testing.assert_close(evaluated(found, *operands), plain(operands[0]))
    torch.testing.assert_close(operands[3], plain.running_mean)


@pytest.mark.parametrize("call", [
    lambda t, buffer: (F.batch_norm(t, buffer, buffer, training=True), buffer[:2].add_(1))[0],
    lambda t, buffer: ((t + 1).expand(3, 3)[0].mul_(2), t)[1],
    lambda t, buffer: ((t + 1).split(1)[0].mul_(2), t)[1],
    lambda t, buffer: (h := t.sin(), h.detach().clamp_(0))[0] + 1,
    lambda t, buffer: (h := t.sin(), v := h[0], h.detach()[1].clamp_(0), v + 1)[3],
    lambda t, buffer: (h := t.sin(), h.view(-1).detach().mul_(2))[0],
])
def test_writes_that_cannot_be_traced_are_refused(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match="in place"):
        Normalize()(raw(call, x(3, 3), nn.Buffer(torch.zeros(3))))


@pytest.mark.parametrize("call", [
    lambda t: (h := t.sin(), h.sum(), h.detach().clamp_(0))[2],
    lambda t: (h := t.sin().detach().mul_(2)) + h,
    lambda t: (h := t.sin(), h.clone().detach().mul_(2), h + 1)[2],
])
def test_what_is_detached_may_be_written_where_nothing_else_reads_it(call: Callable[[Tensor], Tensor]) -> None:
    given = x(3, 3)
    torch.testing.assert_close(evaluated(Normalize()(raw(call, given)), given), call(given))


def twice_without_gradients(t: Tensor, seen: Tensor) -> Tensor:
    """What is written to a buffer in two regions without gradients, as spectral norm does where it is called twice."""
    for _ in range(2):
        with torch.no_grad():
            torch.div(seen + t, 2, out=seen)
    return t * seen.clone()


@pytest.mark.parametrize("call", [
    twice_without_gradients,
    lambda t, seen: (seen[:2].add_(1), t * seen)[1],
    lambda t, seen: (t * seen.clone(), seen.add_(1))[0] + seen,
    lambda t, seen: (seen.mul_(2), seen.detach().add_(t), t + seen)[2],
])
def test_writes_to_buffers_are_chained(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    seen, mine, given = torch.ones(3), nn.Buffer(torch.ones(3)), x(3)
    found = Normalize()(raw(call, given, mine))
    torch.testing.assert_close(evaluated(found, given, mine), call(given, seen))
    torch.testing.assert_close(mine.data, seen)
    assert sum(is_update(n, found) for n in found.graph.nodes) == 1


def test_a_call_is_what_it_calls() -> None:
    operands = [x(3), nn.Parameter(x(3)), nn.Buffer(x(3))]
    torch.testing.assert_close(Call(torch.addcmul, operands)(operands[0]), torch.addcmul(*operands))
