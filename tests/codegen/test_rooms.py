"""What ops work in besides, against what the allocator hands out while they run."""

from __future__ import annotations

import itertools

import pytest
import torch

from autopar.codegen.private import allocations
from autopar.codegen.rooms import room_of
from autopar.kernels import linear_cross_entropy as head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_in_chunks(dtype: torch.dtype) -> None:
    rows, width, classes, at_once = 512, 32, 1000, 128
    hidden, weight = torch.randn(rows, width, dtype=dtype), torch.randn(classes, width, dtype=dtype)
    given = hidden, weight, None, torch.zeros(rows, dtype=torch.int64), torch.ones(())
    chunks, wanted = head.Chunks(at_once, dtype), [True, True, False]
    head.made(*given, chunks, wanted)
    most = max(itertools.accumulate(allocations(lambda: head.made(*given, chunks, wanted))))
    told = room_of("linear_cross_entropy_in_chunks", (*given, at_once), False)
    results = (rows + classes) * width * dtype.itemsize
    assert most == pytest.approx(told + results, rel=0.03)


def test_attention_has_a_gradient_in_fp32_by_tiles() -> None:
    query = torch.empty(2, 3, 130, 40, dtype=torch.bfloat16)
    found = room_of("attention_with_dropout_backward", (None, query), True)
    assert found == 2 * 3 * 256 * (64 + 1) * 4
    assert room_of("mm", (query, query), True) == 0.0


@pytest.mark.parametrize(("classes", "worked_on"), [(50257, 50304), (50304, 50304), (50272, 50272), (30522, 30528)])
def test_classes_are_filled_up_where_their_number_is_odd(classes: int, worked_on: int) -> None:
    hidden, weight = torch.empty(4096, 8, dtype=torch.bfloat16), torch.empty(classes, 8, dtype=torch.bfloat16)
    told = room_of("linear_cross_entropy_in_chunks", (hidden, weight, None, None, None, 1024), True)
    assert told == 2.0 * (1024 * worked_on + (worked_on * 8 if worked_on != classes else 0))
