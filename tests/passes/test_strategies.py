"""Strategies: which axes may do what, the specs that follow, and how parameters may rest."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.core.errors import UnknownName
from autopar.core.mesh import Mesh
from autopar.passes.decision import Context
from autopar.passes.modes import MODES, mode_called
from autopar.passes.ops import Op
from autopar.passes.strategies import (
    Storage,
    assignments,
    differentiable,
    factor_parts,
    gather_dim,
    parse_storage,
    storages,
)
from tests.programs import annotated, model_context

LINE, SQUARE = Mesh((2,)), Mesh((2, 2))


def w(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def op_called(name: str, op: str) -> Op:
    return next(o for o in model_context(name).segmented.ops if o.name == op)


def linear(*sizes: int) -> Context:
    rows, inner, columns = sizes
    return annotated(F.linear, torch.randn(rows, inner), w(columns, inner), w(columns))


@pytest.mark.parametrize(("sizes", "mesh", "mode", "expected"), [
    ((4, 4, 4), LINE, "auto", ["e0", "k", "n", "R"]),
    ((4, 4, 4), LINE, "1d", ["n", "R"]),
    ((4, 4, 4), LINE, "ddp", ["e0"]),
    ((4, 4, 4), LINE, "zero3", ["e0"]),
    ((3, 4, 5), LINE, "auto", ["k", "R"]),
    ((3, 4, 4), LINE, "ddp", ["R"]),
    ((4, 2, 6), Mesh((4,)), "auto", ["e0", "R"]),
])
def test_assignments_of_a_linear(sizes: tuple[int, ...], mesh: Mesh, mode: str, expected: list[str]) -> None:
    (op,) = linear(*sizes).segmented.ops
    assert sorted(assignments(op, mesh, MODES[mode], True)) == sorted((key,) for key in expected)


@pytest.mark.parametrize(("assignment", "parts"), [
    (("R", "G", "R"), {}), (("m", "R", "k"), {"m": 2, "k": 5}), (("m", "m", "G"), {"m": 6}),
])
def test_parts_of_factors(assignment: tuple[str, ...], parts: dict[str, int]) -> None:
    assert factor_parts(assignment, Mesh((2, 3, 5))) == parts


def test_two_axes_on_one_factor_multiply() -> None:
    (op,) = linear(4, 2, 2).segmented.ops
    found = set(assignments(op, SQUARE, MODES["auto"], True))
    assert ("e0", "e0") in found and ("k", "n") in found
    assert not {("k", "k"), ("n", "n")} & found
    assert len(found) == 4 * 4 - 2
    assert assignments(op, SQUARE, MODES["ddp"], True) == [("e0", "e0")]


def test_what_never_meets_the_batch_may_leave_its_gradient_partial() -> None:
    positions = op_called("gpt2", "transformer_wpe")
    assert ("G",) in assignments(positions, LINE, MODES["auto"], True)
    assert ("G",) not in assignments(positions, LINE, MODES["auto"], False)
    tokens = op_called("gpt2", "transformer_wte")
    assert ("G",) not in assignments(tokens, LINE, MODES["auto"], True)


def test_modes() -> None:
    assert set(MODES) == {"auto", "ddp", "zero1", "zero2", "zero3", "1d", "sequence", "zero+1d", "2d", "2.5d", "3d",
                          "pp", "pp+zero", "pp1d", "pp2d", "pp2.5d", "pp3d", "pp+sequence"}
    with pytest.raises(UnknownName, match=r"unknown mode '5d'; known: 1d, 2\.5d, 2d, 3d, auto, ddp"):
        mode_called("5d")


@pytest.mark.parametrize(("assignment", "expected", "made"), [
    (("e0",), ["S0R", "RR(G0)", "R(G0)"], "S0R"),
    (("k",), ["RS0", "RS0", "R(P0)"], "RR(P0)"),
    (("n",), ["RR(G0)", "S0R", "S0"], "RS0"),
    (("R",), ["RR", "RR", "R"], "RR"),
    (("G",), ["RR(G0)", "RR(G0)", "R(G0)"], "RR(G0)"),
    (("e0", "n"), ["S0R(G1)", "S1R(G0)", "S1(G0)"], "S0S1"),
    (("k", "k"), ["RS01", "RS01", "R(P01)"], "RR(P01)"),
    (("n", "k"), ["RS1(G0)", "S0S1", "S0(P1)"], "RS0(P1)"),
])
def test_specs_of_a_linear(assignment: tuple[str, ...], expected: list[str], made: str) -> None:
    """With a gradient to the input, as in the middle of a model."""
    context = annotated(lambda t, *o: F.linear(t * o[2], *o[:2]), torch.randn(4, 4), w(4, 4), w(4), w(4))
    op = context.segmented.ops[-1]
    assert [str(context.wanted(op, operand, assignment)) for operand in op.operands] == expected
    assert str(context.emitted(op, op.results[0], assignment)) == made


def test_inputs_have_no_gradient_to_sum() -> None:
    context = linear(4, 4, 4)
    (op,) = context.segmented.ops
    assert str(context.wanted(op, op.operands[0], ("n",))) == "RR"


def test_differentiable() -> None:
    def call(t: Tensor, ids: Tensor, trained: Tensor, frozen: Tensor) -> Tensor:
        return F.embedding(ids, trained) * (t + frozen)
    frozen = nn.Parameter(torch.randn(4), requires_grad=False)
    context = annotated(call, torch.randn(4), torch.zeros(4, dtype=torch.long), w(5, 4), frozen)
    assert {n.name for n in differentiable(context.segmented.factored)} - {"output"} == {"p_held2", "embedding", "mul"}


# Storage

def ways(context: Context, name: str, mesh: Mesh, mode: str) -> list[str]:
    factored = context.segmented.factored
    users = {factored.program.sources[node.name].name: (node, found) for node, found in context.parameters().items()}
    node, found = users[name]
    return [str(storage) for storage in storages(factored, node, found, mesh, MODES[mode])]


@pytest.mark.parametrize(("mesh", "mode", "expected"), [
    (LINE, "ddp", ["R"]),
    (LINE, "zero3", ["Z"]),
    (LINE, "1d", ["R", "0"]),
    (LINE, "zero2", ["K"]),
    (LINE, "auto", ["R", "Z", "K", "0", "1"]),
    (Mesh((4,)), "auto", ["R", "Z", "K", "0"]),
    (SQUARE, "1d", ["R,R", "R,0", "0,R", "0,0"]),
])
def test_storages_of_a_linear(mesh: Mesh, mode: str, expected: list[str]) -> None:
    """Its weight (n, k) = (4, 2)."""
    assert ways(linear(4, 2, 4), "held1", mesh, mode) == expected


def test_storages_on_two_axes() -> None:
    found = ways(linear(4, 2, 4), "held1", SQUARE, "auto")
    mixed = {"1,1", "Z,K", "K,Z"}
    assert set(found) == {",".join(states) for states in itertools.product("RZK01", repeat=2)} - mixed
    bias = ways(linear(4, 2, 4), "held2", SQUARE, "auto")
    gathered = {"R,Z", "Z,R", "Z,Z", "R,K", "K,R", "K,K"}
    assert set(bias) == {"R,R", "R,0", "0,R", "0,0"} | gathered


@pytest.mark.parametrize(("name", "sharded"), [
    ("transformer.h.0.attn.c_attn.weight", {"0", "2"}),
    ("transformer.h.0.attn.c_attn.bias", set()),
    ("transformer.h.0.attn.c_proj.weight", {"0", "2"}),
    ("transformer.wte.weight", {"0", "1"}),
    ("transformer.wpe.weight", {"1"}),
    ("transformer.h.0.ln_1.weight", set()),
])
def test_storages_in_gpt2(name: str, sharded: set[str]) -> None:
    assert {s for s in ways(model_context("gpt2"), name, LINE, "auto") if s.isdigit()} == sharded


@pytest.mark.parametrize("text", ["R", "Z", "0", "R,Z", "3,R", "12,Z,R"])
def test_storage_is_written_and_read(text: str) -> None:
    assert str(parse_storage(text)) == text


@pytest.mark.parametrize(("states", "gathered", "parts", "trained", "frozen"), [
    (("R", "R"), (), 1, "RR", "RR"),
    (("Z", "R"), (0,), 2, "RR(G0)", "RR"),
    ((1, "Z"), (1,), 6, "RS0(G1)", "RS0"),
    ((0, 0), (), 6, "S01R", "S01R"),
])
def test_what_a_storage_means(states: Any, gathered: tuple[int, ...], parts: int, trained: str, frozen: str) -> None:
    storage = Storage(states)
    assert storage.gathered == gathered
    assert storage.resting_parts(Mesh((2, 3))) == parts
    assert [str(storage.spec(2, True)), str(storage.spec(2, False))] == [trained, frozen]


@pytest.mark.parametrize(("dims", "sizes", "states", "expected"), [
    (((0,), (1,)), (4, 6), ("Z", "R"), 0),
    (((0,), (1,)), (3, 6), ("Z", "R"), 1),
    (((0,), (1,)), (3, 5), ("Z", "R"), 0),
    (((0,), (1,)), (4, 6), (0, "Z"), 1),
    (((0,), (1,)), (4, 5), (0, "Z"), None),
    (((0, 1),), (4, 6), (0, "Z"), None),
    (((0,), (1, 2)), (3, 2, 5), ("Z", "R"), 1),
    ((), (), ("Z", "R"), None),
])
def test_gather_dim(dims: Any, sizes: tuple[int, ...], states: Any, expected: int | None) -> None:
    assert gather_dim(dims, sizes, Storage(states), SQUARE) == expected
