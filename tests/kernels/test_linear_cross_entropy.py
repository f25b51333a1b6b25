"""Linear and cross entropy in chunks against the plain form in double precision: loss, gradients, shards of classes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autopar.kernels import linear_cross_entropy as module
from autopar.kernels.linear_cross_entropy import (
    Chunks,
    Exchange,
    chunks_for,
    linear_cross_entropy,
    made,
    reference,
)
from autopar.kernels.rows import ELSEWHERE, IGNORED

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Norm of a gradient's error beside its norm: of a few roundings of operands and of the sum over chunks."""
WIDTH = 24
gpu = pytest.param("cuda", marks=pytest.mark.gpu)


def drawn(rows: int, classes: int, dtype: torch.dtype, device: str, biased: bool, ignored: float = 0.2
          ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """hidden, weight, place and bias; a share of the rows is ignored."""
    generator = torch.Generator().manual_seed(rows * classes)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    place = torch.randint(classes, (rows,), generator=generator)
    place[torch.rand(rows, generator=generator) < ignored] = IGNORED
    return floats(rows, WIDTH), floats(classes, WIDTH), place.to(device), floats(classes) if biased else None


def by(rows: int, dtype: torch.dtype = torch.float64) -> Chunks:
    """So many rows at once, sums as `chunks_for` has them."""
    return Chunks(rows, chunks_for(torch.empty(1, 1, dtype=dtype), 1).dtype)


def leaves(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [x for x in (hidden, weight, bias) if x is not None]


def errors(loss: Tensor, hidden: Tensor, weight: Tensor, place: Tensor, bias: Tensor | None, times: float = 2.0,
           scale: Tensor | None = None) -> list[float]:
    """Of the loss and of the gradients of so many times it, beside their norms in double precision."""
    exact = [x.detach().double().requires_grad_() for x in leaves(hidden, weight, bias)]
    wanted = reference(exact[0], exact[1], place, exact[2] if bias is not None else None, scale)
    theirs = [wanted, *torch.autograd.grad(times * wanted, exact)]
    mine = [loss, *torch.autograd.grad(times * loss, leaves(hidden, weight, bias))]
    pairs = [(m.detach().double(), t.detach()) for m, t in zip(mine, theirs, strict=True)]
    return [float((m - t).norm() / t.norm().clamp(min=1e-30)) for m, t in pairs]


@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", CLOSE)
def test_loss_and_gradients_are_the_plain_forms(dtype: torch.dtype, biased: bool, device: str) -> None:
    hidden, weight, place, bias = drawn(300, 77, dtype, device, biased)
    loss = linear_cross_entropy(hidden, weight, place, bias, None, by(128, dtype))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == ()
    assert max(errors(loss, hidden, weight, place, bias)) <= CLOSE[dtype]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
def test_any_shape_and_chunk(rows: int, classes: int, at_once: int, biased: bool, ignored: float) -> None:
    hidden, weight, place, bias = drawn(rows, classes, torch.float64, "cpu", biased, ignored)
    loss = linear_cross_entropy(hidden, weight, place, bias, None, by(at_once))
    assert max(errors(loss, hidden, weight, place, bias)) <= 1e-12


def test_gradcheck() -> None:
    hidden, weight, place, bias = drawn(9, 7, torch.float64, "cpu", True)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return 3 * linear_cross_entropy(h, w, place, b, None, by(4))

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_all_rows_ignored() -> None:
    hidden, weight, place, _ = drawn(9, 7, torch.float32, "cpu", False, ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, place)
    assert loss == 0.0 and not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


def shares(cuts: list[int], dtype: torch.dtype, device: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loss and the gradients that ranks with classes between `cuts` find, put together; and those of one rank."""
    hidden, weight, place, bias = drawn(50, cuts[-1], dtype, device, True)
    assert bias is not None
    logits = (hidden @ weight.t() + bias).detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
    parts, one = [], logits.new_ones(())
    for first, last in itertools.pairwise(cuts):
        here = (place >= first) & (place < last)
        own = (place - first).where(here, ELSEWHERE).where(place != IGNORED, IGNORED)
        parts.append(made(hidden.detach(), weight.detach()[first:last], bias.detach()[first:last], own, one,
                          by(16, dtype), [True] * 3, by_chunk(logits.logsumexp(1), 16)))
    losses, of_hidden, of_weight, of_bias = zip(*parts, strict=True)
    whole = linear_cross_entropy(hidden, weight, place, bias, None, by(16, dtype))
    found = [torch.stack(losses).sum(), torch.stack(of_hidden).sum(0), torch.cat(of_weight), torch.cat(of_bias)]
    return found[0], found[1:], [whole.detach(), *torch.autograd.grad(whole, (hidden, weight, bias))]


def by_chunk(total: Tensor, at_once: int) -> Exchange:
    """An exchange that knows what comes of all ranks' sums."""
    chunks = iter(total.split(at_once))
    return lambda mine: next(chunks).to(mine.dtype)


@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cuts", [[0, 20, 40], [0, 3, 40], [0, 1, 13, 14, 40]], ids=str)
def test_shards_of_classes_however_uneven_come_to_the_whole(cuts: list[int], dtype: torch.dtype, device: str) -> None:
    loss, gradients, whole = shares(cuts, dtype, device)
    for mine, theirs in zip((loss, *gradients), whole, strict=True):
        assert float((mine.double() - theirs.double()).norm()) <= CLOSE[dtype] * float(theirs.double().norm())


def test_only_what_is_wanted_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, place, bias = drawn(20, 9, torch.float32, "cpu", True)
    assert bias is not None
    every = torch.autograd.grad(linear_cross_entropy(hidden, weight, place, bias), (hidden, weight, bias))
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    for (name, x), gradient in zip(inputs.items(), every, strict=True):
        other = {n: v if n == name else v.detach() for n, v in inputs.items()}
        loss = linear_cross_entropy(other["hidden"], other["weight"], place, other["bias"])
        assert torch.equal(torch.autograd.grad(loss, x)[0], gradient)
    monkeypatch.setattr(module, "forward_backward", refused)
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, place, bias, None, by(8, torch.float32))
    assert not quiet.requires_grad
    assert float(quiet) == pytest.approx(float(reference(hidden, weight, place, bias).detach()), rel=1e-6)


def refused(*_: object) -> None:
    raise AssertionError("gradients were made")


def test_it_may_be_used_twice_and_gone_back_through_again() -> None:
    hidden, weight, place, _ = drawn(20, 9, torch.float64, "cpu", False)
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, place), weight)[0]
    loss = linear_cross_entropy(hidden, weight, place)
    both = 2 * loss + linear_cross_entropy(hidden, weight, place)
    for _ in range(2):
        assert torch.allclose(torch.autograd.grad(both, weight, retain_graph=True)[0], 3 * once)


def test_it_stays_one_op_and_compiles() -> None:
    hidden, weight, place, bias = drawn(20, 9, torch.float32, "cpu", True)
    torch.library.opcheck(module._op, (hidden, weight, bias, place, torch.ones(()), 8, torch.float32, [True] * 3))

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, place) / 7

    compiled: Callable[..., Tensor] = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(torch.autograd.grad(compiled(hidden, weight), (hidden, weight)),
                            torch.autograd.grad(loss(hidden, weight), (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("dtype", CLOSE)
def test_a_scale_is_as_if_the_loss_were_multiplied(dtype: torch.dtype, device: str) -> None:
    hidden, weight, place, bias = drawn(100, 31, dtype, device, True)
    scale = torch.tensor(1 / 83, dtype=torch.float64, device=device)
    loss = linear_cross_entropy(hidden, weight, place, bias, scale, by(32, dtype))
    assert max(errors(loss / scale, hidden, weight, place, bias)) <= CLOSE[dtype]


def test_16_bit_gradients_summed_in_32_are_as_exact_as_the_plain_forms() -> None:
    hidden, weight, place, _ = drawn(1024, 300, torch.bfloat16, "cpu", False)
    scale = torch.tensor(1 / 3)
    mine = linear_cross_entropy(hidden, weight, place, None, scale, Chunks(128, torch.float32))
    coarse = linear_cross_entropy(hidden, weight, place, None, scale, Chunks(128, torch.bfloat16))
    plain = errors(reference(hidden, weight, place), hidden, weight, place, None)
    exact, rough = (errors(loss, hidden, weight, place, None, 1.0, scale) for loss in (mine, coarse))
    assert all(m <= 1.1 * p + 1e-6 for m, p in zip(exact, plain, strict=True)), (exact, plain)
    assert exact[2] < rough[2] <= 3 * plain[2]


@pytest.mark.parametrize(("rows", "width", "classes", "at_once"), [
    (8192, 768, 50304, 2048), (8192, 4096, 50304, 4096), (32768, 768, 50304, 4096), (16384, 768, 6288, 10752),
    (100, 32, 96, 100), (5000, 1600, 256000, 2048), (0, 8, 8, 1)])
def test_rows_of_a_chunk(rows: int, width: int, classes: int, at_once: int) -> None:
    assert chunks_for(torch.empty(rows, width, device="meta"), classes).rows == at_once


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [50257, 50304])
def test_16_bit_gradients_are_as_good_as_the_plain_forms(classes: int) -> None:
    hidden, weight, place, _ = drawn(4096, classes, torch.bfloat16, "cuda", False)
    mine = errors(linear_cross_entropy(hidden, weight, place), hidden, weight, place, None)
    plain = errors(reference(hidden, weight, place), hidden, weight, place, None)
    assert all(m <= 2 * p + 1e-5 for m, p in zip(mine, plain, strict=True)), (mine, plain)


@pytest.mark.gpu
def test_memory_is_a_tenth_of_the_plain_forms() -> None:
    hidden, weight, place, _ = drawn(8192, 50304, torch.bfloat16, "cuda", False)
    assert peak(linear_cross_entropy, hidden, weight, place) <= 0.1 * peak(reference, hidden, weight, place)


def peak(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, place: Tensor) -> int:
    """Bytes that a step has at most beside what is there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(loss(hidden, weight, place), (hidden, weight))
    return torch.cuda.max_memory_allocated() - before
