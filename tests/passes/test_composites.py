"""Composites written out: the same values and gradients, in ops that have rules or rename."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from autopar.passes.factors import IN_ORDER, PERMUTED
from autopar.passes.rules.table import rule_of
from tests.programs import evaluated, program


def r(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)))


ROWS, SIGNS = r(4, 6), torch.tensor([1.0, -1.0, 1.0, -1.0])
CALLS: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
    (torch.outer, (r(3), r(4))), (torch.inner, (ROWS, r(3, 6))), (torch.kron, (r(2, 2), r(2, 3))),
    (lambda a, b: torch.tensordot(a, b, 1), (ROWS, r(6, 3))), (torch.linalg.vecdot, (ROWS, ROWS + 1)),
    (torch.matmul, (ROWS, r(2, 6, 3))), (torch.matmul, (ROWS, r(6))),
    (lambda a, b: torch.einsum("...i,ji->...j", a, b), (r(2, 4, 6), r(3, 6))),
    (torch.linalg.norm, (ROWS,)), (lambda t: t.movedim(0, 2) + 0, (r(2, 3, 4),)),
    (lambda t: t.swapaxes(0, 1) * 2, (ROWS,)), (lambda t: t.mT * 2, (ROWS,)), (lambda t: t.tile(2, 3), (ROWS,)),
    (lambda a, b: a.expand_as(b) * b, (r(4, 1), ROWS)), (lambda t: t.broadcast_to(4, 6) * 2, (r(6),)),
    (lambda a, b: torch.broadcast_tensors(a, b)[0] * 2, (r(4, 1), ROWS)),
    (lambda a, b: torch.meshgrid(a, b, indexing="ij")[1] * 2, (r(3), r(4))),
    (lambda a, b: torch.hstack((a, b)), (ROWS, ROWS)), (lambda a, b: torch.vstack((a, b)), (ROWS, ROWS)),
    (lambda t: t.narrow(1, 2, 3) * 2, (ROWS,)), (lambda t: t.ravel() * 2, (ROWS,)),
    (lambda a, j: a.take_along_dim(j, 1), (ROWS, torch.tensor([[0, 5]]))),
    (F.pairwise_distance, (ROWS, ROWS + 1)), (F.triplet_margin_loss, (ROWS, ROWS + 1, ROWS - 2)),
    (F.cosine_embedding_loss, (ROWS, ROWS + 1, SIGNS)), (F.margin_ranking_loss, (r(4), r(4) + 1, SIGNS)),
    (F.hinge_embedding_loss, (r(4), SIGNS)), (F.poisson_nll_loss, (ROWS, ROWS.exp())),
    (lambda t: t.unbind(1)[2] * t.unbind(-1)[0], (r(4, 3),)), (lambda t: t.split([1, 5], 1)[1] * 2, (ROWS,)),
    (lambda t: t.split(4, 1)[1] * 2, (ROWS,)), (lambda t: t.chunk(4, 1)[3] * 2, (r(4, 7),)),
    (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
     (r(2, 4, 3, 8), r(2, 2, 3, 8), r(2, 2, 3, 8))),
    (lambda q, k: F.scaled_dot_product_attention(q, k, q, enable_gqa=True), (r(2, 4, 3, 8), r(2, 1, 3, 8))),
]


@pytest.mark.parametrize(("call", "operands"), CALLS)
def test_values_and_gradients_are_the_same(call: Callable[..., Any], operands: tuple[Tensor, ...]) -> None:
    def trial(run: Callable[..., Any]) -> list[Tensor]:
        given = [o.clone().requires_grad_(o.is_floating_point()) for o in operands]
        made = run(*given)
        made.sum().backward()
        return [made.detach(), *(o.grad for o in given if o.grad is not None)]

    written = program(call, *operands)
    for mine, theirs in zip(trial(lambda *o: evaluated(written, *o)), trial(call), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("call", "operands"), CALLS)
def test_every_op_has_a_rule_or_renames(call: Callable[..., Any], operands: tuple[Tensor, ...]) -> None:
    for node in program(call, *operands).graph.nodes:
        if node.op == "call_function" and any(isinstance(v, Tensor) for v in pytree.tree_leaves(node.meta["val"])):
            constant = not node.all_input_nodes
            assert constant or node.target in IN_ORDER | PERMUTED or rule_of(node) is not None, node.format_node()
