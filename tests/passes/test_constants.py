"""What depends on no input is evaluated; masks are recognised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.core.errors import CaptureError
from autopar.passes.capture import capture
from autopar.passes.constants import mask_pattern
from tests.programs import evaluated, program, targets

TRIANGLE = torch.ones(4, 4, dtype=torch.bool).tril()


def additive(seen: Tensor, hidden: float = float("-inf"), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, hidden)


@pytest.mark.parametrize(("mask", "pattern"), [
    (TRIANGLE, "causal"),
    (TRIANGLE.expand(2, 1, 4, 4), "causal"),
    (TRIANGLE.repeat(2, 3, 1, 1), "causal"),
    (additive(TRIANGLE), "causal"),
    (additive(TRIANGLE, torch.finfo(torch.float32).min), "causal"),
    (additive(TRIANGLE, torch.finfo(torch.bfloat16).min, torch.bfloat16), "causal"),
    (additive(TRIANGLE).expand(2, 1, 4, 4), "causal"),
    (torch.ones(3, 5, dtype=torch.bool), "full"),
    (torch.ones(1, 1, dtype=torch.bool).expand(4, 4), "full"),
    (torch.zeros(2, 1, 4, 4), "full"),
    (torch.ones(1, 1, dtype=torch.bool), "full"),
    (TRIANGLE.t(), "masked"),
    (torch.ones(4, 5, dtype=torch.bool).tril(), "masked"),
    (torch.ones(4, 4, dtype=torch.bool).tril(1), "masked"),
    (torch.ones(4, 4, dtype=torch.bool).tril() & torch.ones(4, 4, dtype=torch.bool).triu(-1), "masked"),
    (torch.stack([TRIANGLE, torch.ones(4, 4, dtype=torch.bool)]), "masked"),
    (torch.tensor([True, True, True, False]).expand(4, 4), "masked"),
    (torch.zeros(4, 4, dtype=torch.bool), "masked"),
    (additive(TRIANGLE, -1.0), "masked"),
    (additive(TRIANGLE) + torch.eye(4), "masked"),
    (torch.arange(4.0).expand(4, 4), "masked"),
])
def test_mask_pattern(mask: Tensor, pattern: str) -> None:
    assert mask_pattern(mask) == pattern


def attend(mask: Callable[[torch.device], Tensor | None], **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda t: F.scaled_dot_product_attention(t, t, t, mask(t.device), **options)


def rows(device: torch.device) -> Tensor:
    return torch.arange(4, device=device)


@pytest.mark.parametrize(("call", "note", "causal"), [
    (attend(lambda d: None), "full", False),
    (attend(lambda d: None, is_causal=True), "causal", True),
    (attend(lambda d: rows(d)[:, None] >= rows(d)), "causal", True),
    (attend(lambda d: torch.ones(2, 1, 4, 4, dtype=torch.bool, device=d).tril()), "causal", True),
    (attend(lambda d: torch.full((4, 4), float("-inf"), device=d).triu(1), scale=0.5), "causal", True),
    (attend(lambda d: torch.zeros(1, 1, 4, 4, device=d)), "full", False),
    (attend(lambda d: (rows(d)[:, None] >= rows(d)) & (rows(d)[:, None] < rows(d) + 2)), "masked", None),
    (attend(lambda d: -(rows(d)[:, None] - rows(d)).abs().float()), "masked", None),
])
def test_attention_is_rewritten_for_what_its_mask_lets_through(call: Any, note: str, causal: bool | None) -> None:
    x = torch.randn(2, 3, 4, 5)
    found = program(call, x)
    assert found.notes == (f"attention: {note}",)
    node = next(n for n in found.graph.nodes if "scaled_dot" in str(n.target))
    if causal is not None:
        assert len(node.args) == 3 or node.args[3] is None
        assert not found.placeholders("constant")
        assert bool(node.kwargs.get("is_causal", len(node.args) > 5 and node.args[5])) == causal
    torch.testing.assert_close(evaluated(found, x), call(x))


def test_a_mask_that_is_an_input_stays() -> None:
    x, mask = torch.randn(2, 3, 4, 5), TRIANGLE.expand(2, 1, 4, 4)
    found = program(F.scaled_dot_product_attention, x, x, x, mask)
    assert found.notes == ("attention: masked",)
    torch.testing.assert_close(evaluated(found, x, x, x, mask), F.scaled_dot_product_attention(x, x, x, mask))


def positions(t: Tensor, table: Tensor) -> Tensor:
    index = torch.arange(t.shape[1], device=t.device).unsqueeze(0) + 1
    return t * F.embedding(index.cumsum(-1) - index, table) + index.shape[1]


def like(t: Tensor) -> Tensor:
    return t * torch.ones_like(t).cumsum(0) + t.new_full((4,), 2.0) - torch.zeros_like(t)


def filled(t: Tensor) -> Tensor:
    new = torch.zeros_like(t)
    new[1:, ::2] = 3.0
    return t + new


def pieces(t: Tensor) -> Tensor:
    low, high = torch.arange(6.0, device=t.device).reshape(2, 3).chunk(2)
    return t * low[0, 0] + high.sum()


@pytest.mark.parametrize(("call", "operands", "expected"), [
    (positions, [torch.randn(2, 3, 4), nn.Parameter(torch.randn(9, 4))], ["embedding", "mul", "add"]),
    (like, [torch.randn(3, 4)], ["mul", "add", "sub"]),
    (filled, [torch.randn(3, 4)], ["add"]),
    (pieces, [torch.randn(3, 4)], ["mul", "add"]),
])
def test_constants_are_evaluated(call: Any, operands: list[Tensor], expected: list[str]) -> None:
    found = program(call, *operands)
    assert targets(found) == expected
    assert all(found.constants[n.name].shape == n.meta["val"].shape for n in found.placeholders("constant"))
    assert not any(c.is_meta for c in found.constants.values())
    torch.testing.assert_close(evaluated(found, *operands), call(*operands))


def test_what_is_the_same_along_a_dim_is_stored_once() -> None:
    def call(t: Tensor) -> Tensor:
        seen = rows(t.device)[:, None] < rows(t.device) + 2
        return t.masked_fill(seen.expand(2, 3, 4, 4) & (rows(t.device) > 0).expand(2, 1, 4, 4), 0.0)
    x = torch.randn(2, 3, 4, 4)
    found = program(call, x)
    (mask,) = found.constants.values()
    assert mask.shape == x.shape and mask.untyped_storage().nbytes() == 16
    torch.testing.assert_close(evaluated(found, x), call(x))


def test_random_numbers_are_no_constants() -> None:
    found = program(lambda t: t * torch.rand(3, device=t.device) + torch.rand_like(t), torch.randn(3))
    assert targets(found) == ["rand", "mul", "rand_like", "add"]


class Held(nn.Module):
    """A plain tensor attribute, which export keeps as a constant."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.table = torch.arange(3.0, device=device)

    def forward(self, t: Tensor) -> Tensor:
        return t * self.weight + self.table


def test_a_constant_on_meta_has_no_value() -> None:
    with pytest.raises(CaptureError, match=r"shape \(3,\) lives on meta.*real device"):
        capture(Held("meta"), ((torch.ones(3),), {}))
