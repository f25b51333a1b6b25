"""Kernels over rows of logits against their plain forms: on a GPU, and on CPUs by `TRITON_INTERPRET=1 pytest`."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.kernels.rows import ELSEWHERE, IGNORED, REFERENCE, rows_of, triton_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
TRITON: Any = triton_rows() if interpreted or DEVICE == "cuda" else None
runs = pytest.mark.skipif(TRITON is None, reason="needs Triton, and a GPU or TRITON_INTERPRET=1")
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""How far gradients, in [-1, 1], may be apart: a rounding."""
TABLE = [(57, 64, 5), (200, 200, 64), (1, 1, 3), (64, 128, 64), (130, 192, 8192)]
"""(classes, columns, elements that a program takes at once)."""


def made(classes: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of 20 rows that lie apart, noise in their padding, and places with one elsewhere and one ignored."""
    generator = torch.Generator().manual_seed(classes)
    logits = (5 * torch.randn(20, width + 8, generator=generator)).to(dtype).to(DEVICE)[:, :width]
    place = torch.randint(classes, (20,), generator=generator)
    place[3], place[4] = ELSEWHERE, IGNORED
    return logits, place.to(DEVICE)


@runs
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("classes", "width", "block"), TABLE)
def test_kernels_do_what_their_plain_forms_do(classes: int, width: int, block: int, dtype: torch.dtype,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.kernels.triton_rows.LARGEST_BLOCK", max(32, 1 << (block - 1).bit_length()))
    logits, place = made(classes, width, dtype)
    wanted = logits.clone()
    scale = torch.tensor(0.5, device=DEVICE)
    total, found = REFERENCE.both(wanted, place, scale, classes)
    at_once, apart = logits.clone(), logits.clone()
    sums = TRITON.sums(apart, place, classes)
    assert torch.equal(apart, logits)
    TRITON.slopes(apart, place, sums[0], scale, classes)
    for mine in (sums, TRITON.both(at_once, place, scale, classes)):
        torch.testing.assert_close(mine[0], total, rtol=2e-6, atol=2e-6)
        assert torch.equal(mine[1][place >= 0], found[place >= 0])
    for slopes in (apart, at_once):
        torch.testing.assert_close(slopes.float(), wanted.float(), rtol=0.0, atol=ROUNDING[dtype])
        assert not slopes[:, classes:].any() and not slopes[place == IGNORED].any()


@runs
def test_a_class_that_there_is_not_gives_no_number() -> None:
    logits, place = made(57, 64, torch.float32)
    place[7] = 57
    assert TRITON.both(logits, place, torch.ones((), device=DEVICE), 57)[1].isnan().nonzero().tolist() == [[7]]


def test_the_plain_form_refuses_a_class_that_there_is_not() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        REFERENCE.both(torch.zeros(2, 8), torch.tensor([0, 8]), torch.ones(()), 8)


def test_rows_hidden_altogether_but_for_one_class() -> None:
    """What is masked to -inf, a whole block of it at the front, gets no gradient."""
    for each in [REFERENCE, *([] if TRITON is None else [TRITON])]:
        logits = torch.full((2, 256), -torch.inf, device=DEVICE)
        logits[:, 200] = 3.0
        total, found = each.both(logits, torch.tensor([200, ELSEWHERE], device=DEVICE),
                                 torch.ones((), device=DEVICE), 256)
        assert total.tolist() == [3.0, 3.0] and found[0] == 3.0
        assert logits[0].count_nonzero() == 0 and logits[1, 200] == 1.0 and logits[1].sum() == 1.0


def test_who_works_on_what() -> None:
    assert rows_of(torch.empty(1, 8)) is REFERENCE
    assert rows_of(torch.empty(1, 8, dtype=torch.float64, device=DEVICE)) is REFERENCE
