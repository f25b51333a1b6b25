"""A micro-batch's program is what would be captured of one, but for losses, which sum up to the whole batch's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from autopar.api import arguments
from autopar.core.errors import AutoparError
from autopar.passes.capture import Program, capture
from autopar.passes.decision import Context
from autopar.passes.micro import micro
from autopar.planner import prepare
from tests.builders import CASES, Case, gpt2
from tests.families import family
from tests.programs import model_context


def annotated(case: Case, parts: int = 1) -> Context:
    """The program of the first of `parts` equal parts of a case's batch."""
    call = pytree.tree_map_only(torch.Tensor, lambda x: x[:x.shape[0] // parts], arguments(case.inputs))
    return prepare(capture(case.model, call, "fp32", case.loss_fn))


def told(program: Program) -> list[str]:
    """Calls with their arguments and shapes, losses and what follows left out."""
    calls = [n for n in program.graph.nodes if not n.name.startswith("count_")]
    end = next((i for i, n in enumerate(calls) if "cross_entropy" in str(n.target)), len(calls))
    return [f"{n.target} {n.args} {getattr(n.meta.get('val'), 'shape', None)}" for n in calls[:end]]


@pytest.mark.parametrize(("name", "parts"), [("mlp", 4), ("gpt2", 2), ("t5", 2), ("swin", 4)])
def test_it_is_what_would_be_captured(name: str, parts: int) -> None:
    case = CASES[name]() if name in CASES else family(name)
    cut = micro(annotated(case), parts)
    assert told(cut.program) == told(annotated(case, parts).segmented.factored.program)
    assert list(cut.counts) == ["count_0"]


def test_targets_are_counted_over_the_whole_batch() -> None:
    case = gpt2()
    count = micro(annotated(case), 4).counts["count_0"]
    shifted = F.pad(case.inputs["labels"], (0, 1), value=-100)[:, 1:]  # type: ignore[call-overload]
    assert float(count.of({"labels": case.inputs["labels"]})) == int((shifted != -100).sum())  # type: ignore[call-overload]


def test_dropout_in_attention_mixes_no_samples() -> None:
    assert micro(annotated(gpt2(dropout=0.1)), 2).parts == 2


class Squared(nn.Module):
    """A loss whose square is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Any, y: Any) -> Any:
        return F.cross_entropy(self.layer(x), y) ** 2


class Shifted(Squared):
    """A loss to which something is added that no sample has a part in."""

    def forward(self, x: Any, y: Any) -> Any:
        return F.cross_entropy(self.layer(x), y) + self.layer.weight.square().sum()


@pytest.mark.parametrize(("kind", "said"), [(Squared, "pow"), (Shifted, "aten.add.Tensor")])
def test_losses_that_do_not_sum_up_are_refused(kind: type[nn.Module], said: str) -> None:
    context = annotated(Case(kind().train(), (torch.randn(8, 4), torch.randint(3, (8,)))))
    with pytest.raises(AutoparError, match=rf"{said}.*use 1 micro-batch"):
        micro(context, 2)
    assert micro(context, 1).program is context.segmented.factored.program


def test_batch_norm_is_refused_by_name() -> None:
    with pytest.raises(AutoparError, match=r"bn1 .*mixes samples.*use 1 micro-batch, or batch_norm="):
        micro(model_context("resnet"), 2)


def test_batch_norm_may_have_statistics_of_each_micro_batch() -> None:
    case = CASES["resnet"]()
    program = replace(capture(case.model, arguments(case.inputs), "fp32", case.loss_fn), batch_norm="micro-batch")
    assert micro(prepare(program), 2).parts == 2


def test_parts_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(AutoparError, match="does not divide into 3 micro-batches; use a batch of 9, or 2"):
        micro(model_context("mlp"), 3)
