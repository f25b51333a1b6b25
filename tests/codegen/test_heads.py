"""Heads in chunks as modules: 16 bits, classes that there are not, what a compiler sees of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autopar.codegen.communicator import Communicator, Group
from autopar.codegen.heads import LinearCrossEntropy
from autopar.codegen.vocabulary import Places
from autopar.core.mesh import Mesh
from tests.simulator import simulate

ROWS, WIDTH, CLASSES = 96, 16, 64
MESH = Mesh((2, 2))


def head(rows: Group, classes: Group) -> LinearCrossEntropy:
    return LinearCrossEntropy(rows, classes, Places((CLASSES,), (classes,)))


def operands(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """hidden, target with rows that are ignored, weight."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator).to(device, dtype) for n in (ROWS, CLASSES))
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[:40] = -100
    return hidden, target.to(device), weight


def expected(hidden: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the gradients in double precision."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(h @ w.t(), target)
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 6e-3), (torch.float16, 1e-3), (torch.float32, 1e-6)])
def test_rows_and_classes_cut_come_to_the_whole(dtype: torch.dtype, close: float) -> None:
    hidden, target, weight = operands(dtype)

    def act(communicator: Communicator) -> tuple[Tensor, Tensor, Tensor]:
        rows, classes = communicator.group((0,)), communicator.group((1,))
        h, t = (x.chunk(2)[rows.index].clone() for x in (hidden, target))
        w = weight.chunk(2)[classes.index].clone().requires_grad_()
        loss = head(rows, classes)(h.requires_grad_(), t, w, dtype=torch.float32)
        loss.backward()
        assert h.grad is not None and w.grad is not None
        return loss.detach(), h.grad.float(), w.grad.float()

    found = simulate(MESH, act)
    losses, of_hidden, of_weight = zip(*found, strict=True)
    wanted = expected(hidden, target, weight)
    assert error(torch.stack(losses).sum(), wanted[0]) <= close
    assert error(torch.cat([of_hidden[0] + of_hidden[1], of_hidden[2] + of_hidden[3]]), wanted[1]) <= close
    assert error(torch.cat([of_weight[0] + of_weight[2], of_weight[1] + of_weight[3]]), wanted[2]) <= close


@pytest.mark.parametrize("number", [CLASSES, CLASSES + 3, -1])
def test_a_class_that_there_is_not_is_refused_on_every_rank(number: int) -> None:
    hidden, target, weight = operands(torch.float32)
    target[50] = number
    for part in range(2):
        classes = Group("", part, (0, 1), (0,))
        with pytest.raises(RuntimeError, match="out of bounds"):
            head(Group("", 0, (0,)), classes)(hidden, target, weight.chunk(2)[part])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_compiler_sees_one_op_of_the_right_shapes(ranks: int) -> None:
    with torch.device("meta"):
        hidden = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(CLASSES // ranks, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        module = head(Group("", 0, (0,)), Group("of nobody", 0, tuple(range(ranks)), (0,)))
        loss = module(hidden, torch.zeros(ROWS, dtype=torch.int64), weight, dtype=torch.float32)
        found = torch.autograd.grad(loss, (hidden, weight))
    assert loss.shape == () and loss.dtype == torch.float32
    assert [(g.shape, g.dtype) for g in found] == [(x.shape, x.dtype) for x in (hidden, weight)]
    assert module.result(hidden, loss, weight, dtype=torch.float32).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_by_inductor(dtype: torch.dtype) -> None:
    hidden, target, weight = operands(dtype, "cuda")
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    module = torch.compile(head(Group("", 0, (0,)), Group("", 0, (0,))), fullgraph=True, dynamic=False)
    loss = module(h * 1, target, w * 1, dtype=torch.float32)
    found = (loss.detach(), *torch.autograd.grad(loss, (h, w)))
    for mine, wanted in zip(found, expected(hidden, target, weight), strict=True):
        assert error(mine, wanted) <= 6e-3
