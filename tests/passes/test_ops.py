"""Ops: clusters, order, names, factors and what sharding them means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autopar.passes.capture import capture
from autopar.passes.ops import Op, block_of, unique
from autopar.passes.segments import annotate
from tests.programs import annotated, model_context, prepared


def w(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def ops_of(call: Callable[..., Any], *operands: Tensor) -> list[list[str]]:
    """The nodes of each op."""
    return [[n.name for n in op.nodes] for op in annotated(call, *operands).segmented.ops]


X = torch.randn(4, 6)


@pytest.mark.parametrize(("call", "expected"), [
    (lambda t: t.sin().cos().exp(), [["sin", "cos", "exp"]]),
    (lambda t: t.sin() * t.cos(), [["sin", "cos", "mul"]]),
    (lambda t: (t @ t.t()).sin(), [["matmul"], ["sin"]]),
    (lambda t: t.sin().softmax(-1).cos(), [["sin", "softmax", "cos"]]),
    (lambda t: t.sin() + t.sin().sum(-1, keepdim=True), [["sin", "sin_1", "sum_1", "add"]]),
    (lambda t: (s := t.sin(), s.cos() * (s @ s.t()).exp()[:, :1])[1], [["sin", "cos"], ["matmul"], ["exp"], ["slice_1"],
                                                                       ["mul"]]),
    (lambda t: t.sin().view(2, 12).cos(), [["sin"], ["cos"]]),
    (lambda t: t.sin()[:, :3] + t[:, 3:], [["sin", "slice_1", "slice_2", "add"]]),
    (lambda t: torch.cat((-t[:, 3:], t[:, :3]), -1) * t, [["slice_1", "neg", "slice_2", "cat", "mul"]]),
    (lambda t: t * (t.square().mean(-1, keepdim=True) + 1).rsqrt(), [["square", "mean", "add", "rsqrt", "mul"]]),
    (lambda t: t.sin().unsqueeze(0) * torch.ones(3, 1, 1, device=t.device), [["sin"], ["mul"]]),
    (lambda t: sum(part.sin() for part in t.split(2, -1)), [["sin", "add", "sin_1", "add_1", "sin_2", "add_2"]]),
    (lambda t: t.max(-1)[0].sin(), [["max_1", "getitem"], ["sin"]]),
    (lambda t: F.dropout(t.sin(), 0.5).cos(), [["sin", "dropout", "cos"]]),
    (lambda t: F.cross_entropy(t.sin(), t[:, 0].long()), [["sin"], ["select"], ["to"], ["cross_entropy_loss"]]),
])
def test_what_runs_as_one_kernel_is_one_op(call: Callable[[Tensor], Tensor], expected: list[list[str]]) -> None:
    assert sorted(map(sorted, ops_of(call, X))) == sorted(map(sorted, expected))


def test_blocks_are_not_fused() -> None:
    block = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Sigmoid(), nn.Tanh()))
    model = nn.ModuleDict({"h": nn.ModuleList([block, nn.ReLU()])})
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model
        def forward(self, t: Tensor) -> Tensor:
            for layer in self.body["h"]:
                t = layer(t)
            return t
    made = annotate(prepared(capture(Net(), ((X,), {}))))
    assert [[n.name for n in op.nodes] for op in made.ops] == [["relu", "sigmoid", "tanh"], ["relu_1"]]
    assert [op.block for op in made.ops] == ["body.h.0", "body.h.1"]


@pytest.mark.parametrize(("path", "block"), [
    ("transformer.h.0.attn.c_attn", "transformer.h.0"), ("layer1.2", "layer1.2"), ("layer1.2.conv1", "layer1.2"),
    ("0.1", "0"), ("12", "12"), ("layer1", ""), ("conv1.weight", ""), ("", ""), ("a.b", ""),
    ("blocks.3.sub.4.x", "blocks.3"), ("0.1.2", "0"),
])
def test_block_of(path: str, block: str) -> None:
    node = fx.Graph().placeholder("x")
    node.meta["path"] = path
    assert block_of(node) == block


MODELS = ["gpt2", "resnet", "mlp"]


@pytest.mark.parametrize("name", MODELS)
def test_names_are_unique(name: str) -> None:
    names = [op.name for op in model_context(name).segmented.ops]
    assert len(set(names)) == len(names)
    assert all(text and "." not in text for text in names)


@pytest.mark.parametrize("name", MODELS)
def test_every_operand_comes_before_its_op(name: str) -> None:
    segmented = model_context(name).segmented
    made: set[fx.Node] = set()
    for op in segmented.ops:
        for operand in op.operands:
            base = segmented.factored.base(operand.node)[0]
            assert base.op == "placeholder" or base in made
        made |= {result.node for result in op.results}


@pytest.mark.parametrize("name", MODELS)
def test_clusters_are_convex_and_cover_the_program_once(name: str) -> None:
    segmented = model_context(name).segmented
    graph, aliases = segmented.factored.program.graph, segmented.factored.aliases
    owner = {node: i for i, op in enumerate(segmented.ops) for node in op.nodes}
    assert len(owner) == sum(len(op.nodes) for op in segmented.ops)
    missing = {n for n in graph.nodes if n.op == "call_function" and n not in owner and n not in aliases}
    assert all(user in aliases for node in missing for user in node.users)
    reached: dict[fx.Node, set[int]] = {}
    for node in graph.nodes:
        behind = set().union(*(reached[source] | {owner.get(source, -1)} for source in node.all_input_nodes))
        inside = {owner.get(source) for source in node.all_input_nodes}
        left_and_returned = owner[node] in behind and owner[node] not in inside if node in owner else False
        assert not left_and_returned, f"{node} comes back to its cluster"
        reached[node] = behind


@pytest.mark.parametrize(("names", "expected"), [
    (["a", "b"], ["a", "b"]), (["a", "a", "a"], ["a", "a_1", "a_2"]), (["fc", "fc_1", "fc"], ["fc", "fc_1", "fc_2"]),
    (["fc", "fc", "fc_1"], ["fc", "fc_2", "fc_1"]), ([], []),
])
def test_names_that_occur_again_are_numbered(names: list[str], expected: list[str]) -> None:
    assert unique(names) == expected


@pytest.mark.parametrize(("name", "expected"), [
    ("gpt2", {"transformer_wte", "transformer_h_0_attn_c_attn", "transformer_h_1_mlp_c_proj", "transformer_ln_f",
              "lm_head", "transformer_h_0_attn_scaled_dot_product_attention"}),
    ("resnet", {"conv1", "layer1_0_conv1", "layer2_1_bn3", "layer1_0_downsample_0", "maxpool", "avgpool", "fc",
                "bn1_add", "cross_entropy_loss"}),
    ("mlp", {"0_0", "0_1", "0_2", "1_0", "2", "cross_entropy_loss"}),
])
def test_ops_are_named_after_their_modules(name: str, expected: set[str]) -> None:
    assert expected <= {op.name for op in model_context(name).segmented.ops}


def op_called(name: str, op: str) -> Op:
    return next(o for o in model_context(name).segmented.ops if o.name == op)


@pytest.mark.parametrize(("name", "op", "expected"), [
    ("mlp", "0_0", {"e0": "batch", "k": "data", "+n": "model"}),
    ("mlp", "cross_entropy_loss", {"t": "batch"}),
    ("gpt2", "transformer_h_0_attn_c_attn", {"m_0": "batch", "m_1": "data", "k": "model", "+n_1": "model"}),
    ("gpt2", "transformer_h_0_attn_scaled_dot_product_attention", {"b": "batch", "h": "model"}),
    ("gpt2", "transformer_h_0_ln_1", {"e0": "batch", "e1": "data"}),
    ("gpt2", "transformer_wte", {"e0": "batch", "e1": "data", "d": "model"}),
    ("resnet", "conv1", {"n": "batch", "c": "data", "+o": "model"}),
])
def test_factors_that_may_be_sharded_and_their_roles(name: str, op: str, expected: dict[str, str]) -> None:
    found = {f.key: f.role for f in op_called(name, op).factors if f.shardable}
    wanted = {key.removeprefix("+"): role for key, role in expected.items()}
    assert {key: role for key, role in found.items() if key in wanted} == wanted


def test_summed_factors() -> None:
    linear, loss = op_called("mlp", "0_0"), op_called("mlp", "cross_entropy_loss")
    assert {f.key for f in linear.factors if f.summed} == {"k"}
    assert {f.key for f in loss.factors if f.summed and f.special} == {"t", "c"}
    assert linear.factor("k").size == 16
    assert [o.additive for o in linear.operands] == [False, False, True]


def test_only_the_outermost_factor_of_a_parameter_dim_is_sharded() -> None:
    projection = op_called("gpt2", "transformer_h_0_attn_c_attn")
    sizes = {f.key: (f.size, f.shardable) for f in projection.factors if f.key.startswith("n")}
    assert sizes == {"n_0": (3, False), "n_1": (4, True), "n_2": (8, False)}
