"""Calls by position and by keyword: every way that the plain model takes gives the leaves it was traced with."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopar.codegen.calls import EMPTY, Form, arranged, check_leaf, form_of
from autopar.core.errors import AutoparError

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Model(nn.Module):
    def forward(self, x: Any, y: Any, mask: Any = None, flag: bool = False, scale: float = 1.0) -> Any:
        return x


FORM = form_of(Model(), None)
NAMES = ("x", "y", "mask", "flag", "scale")


def spec_of(call: Call) -> pytree.TreeSpec:
    return pytree.tree_structure(call)


def ways(values: dict[str, Any]) -> list[Call]:
    """Every way to pass `values`: the first few by position, the rest by keyword, in any order."""
    found = []
    for count in range(len(values) + 1):
        if list(values)[:count] != list(NAMES[:count]):
            break
        for order in itertools.permutations(list(values)[count:]):
            found.append((tuple(list(values.values())[:count]), {name: values[name] for name in order}))
    return found


def test_form_of_a_model() -> None:
    assert Form({"x": EMPTY, "y": EMPTY, "mask": None, "flag": False, "scale": 1.0}, 0) == FORM
    assert form_of(nn.Sequential(), lambda output, target: output) == Form({"input": EMPTY}, 1)


@pytest.mark.parametrize("values", [
    {"x": 1, "y": 2}, {"x": 1, "y": 2, "mask": 3}, {"x": 1, "y": 2, "flag": True},
    {"x": 1, "y": 2, "mask": 3, "flag": True},
])
def test_every_way_is_every_other(values: dict[str, Any]) -> None:
    """Whatever way it was traced with, whatever way it is called, each leaf comes where the trace had it."""
    for traced, called in itertools.product(ways(values), repeat=2):
        assert arranged(*called, spec_of(traced), FORM) == pytree.tree_leaves(traced)


def test_the_plain_model_agrees() -> None:
    """What is accepted binds to the same values in the plain model's own signature."""
    signature = inspect.signature(Model().forward)
    whole = {"x": 1, "y": 2, "mask": None, "flag": False, "scale": 1.0}
    traced = ((), dict.fromkeys(NAMES, 0))
    for some in itertools.chain.from_iterable(itertools.combinations(NAMES, n) for n in range(6)):
        for args, kwargs in ways({name: whole[name] for name in NAMES if name in some}):
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                with pytest.raises(AutoparError, match="pass the same as when it was made"):
                    arranged(args, kwargs, spec_of(traced), FORM)
                continue
            bound.apply_defaults()
            assert arranged(args, kwargs, spec_of(traced), FORM) == list(bound.arguments.values())


@pytest.mark.parametrize(("traced", "called", "leaves"), [
    (((1, 2), {}), ((1, 2), {"mask": None, "flag": False}), [1, 2]),              # defaults written out
    (((1, 2, None), {}), ((1,), {"y": 2}), [1, 2, None]), (((1, 2), {"flag": False}), ((1, 2), {}), [1, 2, False]),
    (((1, 2), {"scale": 2.0}), ((1, 2), {"scale": 3.0}), [1, 2, 3.0]),
    (((1,), {"y": {"b": 2, "a": [3, 4]}}), ((), {"y": {"a": (5, 6), "b": 7}, "x": 8}), [8, 7, 5, 6]),
    (((1, {"b": 2, "a": 3}), {}), ((1, {"a": 4, "b": 5}), {}), [1, 5, 4]),
])
def test_defaults_and_dicts(traced: Call, called: Call, leaves: list[Any]) -> None:
    assert arranged(*called, spec_of(traced), FORM) == leaves


@pytest.mark.parametrize(("traced", "called", "said"), [
    (((1, 2), {}), ((1,), {}), "arguments 1 by position, the plan was made for x, y; pass the same"),
    (((), {"x": 1, "y": 2}), ((), {"x": 1}), "the arguments x, the plan was made for x, y"),
    (((1, 2), {}), ((1, 2), {"x": 3}), "arguments 2 by position, x, the plan"),
    (((1, 2), {}), ((1, 2), {"mask": 3}), "mask, the plan was made for x, y"),
    (((1, 2), {}), ((1, 2), {"flag": 0}), "flag, the plan was made for x, y"),
    (((1, 2), {}), ((1, 2), {"other": 3}), "other, the plan was made for x, y"),
    (((1, 2), {}), ((1, 2, 3, 4, 5, 6), {}), "6 by position, the plan was made for x, y"),
    (((1, 2), {}), ((), {}), "the arguments none, the plan was made for x, y"),
])
def test_what_does_not_fit(traced: Call, called: Call, said: str) -> None:
    with pytest.raises(AutoparError, match=said):
        arranged(*called, spec_of(traced), FORM)


@pytest.mark.parametrize(("traced", "called", "leaves"), [
    (((1, 9), {}), ((9,), {"input": 1}), [1, 9]), (((9,), {"input": 1}), ((1, 9), {}), [9, 1]),
    (((1, 9), {}), ((1, 9), {}), [1, 9]),
])
def test_the_target_stays_last(traced: Call, called: Call, leaves: list[Any]) -> None:
    form = form_of(nn.Sequential(), lambda output, target: output)
    assert arranged(*called, spec_of(traced), form) == leaves


@pytest.mark.parametrize("called", [((), {"input": 1}), ((1,), {}), ((1, 2, 9), {}), ((), {}), ((1,), {"target": 9})])
def test_without_a_target(called: Call) -> None:
    form = form_of(nn.Sequential(), lambda output, target: output)
    with pytest.raises(AutoparError, match="made for input, the target; pass the same"):
        arranged(*called, spec_of(((1, 9), {})), form)


class Any_(nn.Module):
    def forward(self, *xs: Any, **named: Any) -> Any:
        return xs


def test_any_number_of_arguments_has_no_names() -> None:
    form, traced = form_of(Any_(), None), ((1, 2), {"a": 3, "b": 4})
    assert arranged((1, 2), {"b": 4, "a": 3}, spec_of(traced), form) == [1, 2, 3, 4]
    for called in (((1,), {"a": 3, "b": 4}), ((1, 2, 5), {"a": 3, "b": 4}), ((1, 2), {"a": 3})):
        with pytest.raises(AutoparError, match="pass the same"):
            arranged(*called, spec_of(traced), form)


def node(value: Any) -> fx.Node:
    made = fx.Graph().placeholder("x")
    made.meta["val"] = value
    return made


T = torch.zeros(2)


@pytest.mark.parametrize(("planned", "leaf"), [
    (T, T.double()), (T, T.bfloat16()), (T.long(), T.int()), (T.bool(), T.bool()), (T.cfloat(), T.cfloat()),
    (None, None), (3, 3), (True, True), ("a", "a"), (0.5, 0.5), (torch.float32, torch.float32),
])
def test_leaves_of_the_kind_planned(planned: Any, leaf: Any) -> None:
    check_leaf(node(planned), leaf)


@pytest.mark.parametrize(("planned", "leaf", "said"), [
    (T, T.long(), "input x is of torch.int64, the plan was made for torch.float32; convert it"),
    (T.long(), T, "is of torch.float32"), (T.bool(), T.long(), "int64"), (T.long(), T.bool(), "bool"),
    (T, T.cfloat(), "complex64"), (3, 4, "input x is 4, of type int, the plan was made for 3, of type int; pass that"),
    (True, False, "input x is False"), (1, True, "input x is True"), (None, T, "input x is tensor"),
    ("a", "b", "is 'b'"), (False, None, "is None"),
    (T, [T], "input x is .tensor.*, of type list, the plan was made for a tensor of shape"), (T, 3, "input x is 3"),
    (T, None, "input x is None"),
])
def test_leaves_of_another_kind(planned: Any, leaf: Any, said: str) -> None:
    with pytest.raises(AutoparError, match=said):
        check_leaf(node(planned), leaf)


def test_constants_of_a_trace_are_known() -> None:
    class Flagged(nn.Module):
        def forward(self, x: Tensor, flag: bool, scale: float, none: None = None) -> Tensor:
            return x * scale if flag else x

    exported = torch.export.export(Flagged(), (T, True, 0.5), {"none": None}, strict=False)
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder"]
    for place, leaf in zip(nodes, (T, True, 0.5, None), strict=True):
        check_leaf(place, leaf)
    for place, leaf in zip(nodes[1:], (False, 0.25, 1), strict=True):
        with pytest.raises(AutoparError, match="the plan was made for"):
            check_leaf(place, leaf)
