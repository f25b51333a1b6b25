"""What an expert would choose, found without being asked for: mesh, modes and budgets are left to the search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.core.cluster import Cluster
from autopar.core.errors import Infeasible
from autopar.models.registry import build
from autopar.passes.capture import Precision, capture
from autopar.passes.decision import Context
from autopar.passes.pins import Pins
from autopar.plan import Plan
from autopar.planner import Request, prepare, solve
from tests.programs import model_context

PRECISION: Precision = "bf16-mixed"
LEAST_PLUS = 1.0001
Mesh = tuple[int, ...] | None


@cache
def named(name: str, batch: int, seq: int | None) -> Context:
    built = build(name, batch, seq)
    return prepare(capture(built.model, built.call, PRECISION, built.loss_fn))


@cache
def planned(name: str, batch: int, seq: int | None, cluster: str) -> Plan:
    return solve(named(name, batch, seq), Cluster.preset(cluster), Request(name, solver="highs"))[0]


def contractions(context: Context, plan: Plan) -> dict[str, str]:
    """The strategy of every op that multiplies by a weight."""
    names = {op.name for op in context.segmented.ops if op.contraction}
    return {op.name: op.strategy for op in plan.ops if op.name in names}


# Memory is free: weights are used whole. Embeddings may be looked up in parts, the rows being few beside the table.

SLOW = pytest.mark.slow
FREE = [("gpt2", 64, 1024, "8xA100-80GB"), ("vit-b16", 256, None, "4xH200")]
MORE_FREE = [("gpt2-medium", 64, 1024, "4xH200"), ("bert-base", 64, 512, "8xA100-80GB"),
             ("gpt2", 64, 1024, "2x8xH100"), ("opt-125m", 64, 1024, "8xA100-80GB"),
             ("resnet152", 256, None, "8xA100-80GB")]
ON_FREE = pytest.mark.parametrize(("name", "batch", "seq", "cluster"), [
    *FREE, *(pytest.param(*point, marks=SLOW) for point in MORE_FREE)])


@ON_FREE
def test_no_weight_is_cut_in_use_where_memory_is_free(name: str, batch: int, seq: int | None, cluster: str) -> None:
    plan = planned(name, batch, seq, cluster)
    found = contractions(named(name, batch, seq), plan)
    assert found and all(strategy.endswith(" X RR") for strategy in found.values())
    assert plan.memory.total < 0.5 * Cluster.preset(cluster).devices[0].memory_bytes


@ON_FREE
def test_no_parameter_is_gathered_twice_where_memory_is_free(name: str, batch: int, seq: int | None,
                                                             cluster: str) -> None:
    """ZeRO-3 in part might hide behind compute, and still is more to send."""
    assert not [p.name for p in planned(name, batch, seq, cluster).parameters if "Z" in p.storage]


# Memory is scarce: every parameter rests cut over every axis.

def axes_of(spec: str) -> set[str]:
    return set(spec) - set("SR")


@pytest.mark.parametrize("mesh", [None, (4,), (2, 2)])
def test_parameters_rest_cut_over_every_axis_under_the_least_budget(mesh: Mesh) -> None:
    context, cluster = model_context("gpt2", PRECISION), Cluster.preset("4xA100-80GB")
    with pytest.raises(Infeasible) as refusal:
        solve(context, cluster, Request("gpt2", mesh=mesh, memory_budget=1.0, solver="highs"))
    assert refusal.value.least_budget_bytes is not None
    budget = refusal.value.least_budget_bytes + 1.0  # most of it are no tensors of so small a model
    plan, _ = solve(context, cluster, Request("gpt2", mesh=mesh, memory_budget=budget, solver="highs"))
    everywhere = {str(axis) for axis in range(len(plan.mesh))}
    assert {p.name: p.spec for p in plan.parameters if axes_of(p.spec) != everywhere} == {}


# A wide perceptron on two hosts.

@dataclass(frozen=True, slots=True)
class Wide:
    """Rows of the batch, width of what is carried, width within, layers."""

    rows: int
    width: int = 4096
    inner: int = 16384
    layers: int = 4


class Layer(nn.Module):
    """Widens, bends and narrows."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        narrowed: Tensor = self.down(F.gelu(self.up(x)))
        return x + narrowed


@cache
def wide(size: Wide) -> Context:
    with torch.device("meta"):
        layers = [Layer(size.width, size.inner) for _ in range(size.layers)]
        model, x = nn.Sequential(*layers).train(), torch.zeros(size.rows, size.width)
    return prepare(capture(model, ((x, x), {}), PRECISION, lambda made, wanted: (made - wanted).square().mean()))


def two_hosts(devices: int, bytes_per_s: float) -> Cluster:
    """Two hosts of A100s, whose uplinks carry so much, all devices of a host together."""
    preset = Cluster.preset(f"2x{devices}xA100-80GB")
    inside = preset.bytes_per_s[0][0]
    return replace(preset, name="two hosts", bytes_per_s=((inside, bytes_per_s), (bytes_per_s, inside)),
                   uplink_bytes_per_s=(bytes_per_s, bytes_per_s))


def on_two_hosts(size: Wide, cluster: Cluster, pins: Pins = (), mesh: Mesh = None) -> tuple[Plan, set[str], set[str]]:
    """The plan, and the strategies of all that widens and of all that narrows, `I` for the axes inside a host."""
    context = wide(size)
    plan, _ = solve(context, cluster, Request("wide", solver="highs", mesh=mesh, pins=pins))
    inside = "".join(str(axis) for axis in range(1, len(plan.mesh)))
    found = {name: text.replace(inside, "I") for name, text in contractions(context, plan).items()}
    assert plan.mesh[0] == 2 and len(found) == 2 * size.layers
    ups, downs = ({text for name, text in found.items() if name.endswith(what)} for what in ("_up", "_down"))
    return plan, ups, downs


@pytest.mark.parametrize(("rows", "devices", "bytes_per_s"), [
    (8192, 2, 60e9), *(pytest.param(*point, marks=SLOW) for point in [(16384, 2, 10e9), (8192, 4, 80e9)])])
def test_columns_then_rows_inside_a_host_and_data_across(rows: int, devices: int, bytes_per_s: float) -> None:
    """Presets have uplinks of 20e9 bytes a second for each device, and links of 240e9 inside a host.

    The first layer's input needs no gradient, so that it may be cut across hosts.
    """
    _, ups, downs = on_two_hosts(Wide(rows), two_hosts(devices, bytes_per_s))
    assert (ups - {"SIS0 = SIR X RS0"}, downs - {"SIR(P0) = SIS0 X S0R"}) == (
        {"S0SI = S0R X RSI"}, {"S0R(PI) = S0SI X SIR"})


def test_hosts_do_the_same_where_summing_gradients_takes_longer() -> None:
    """At 1e9 bytes a second and 512 rows, data parallelism across saves less in compute than it sends."""
    size, cluster = Wide(512), two_hosts(2, 1e9)
    plan, ups, downs = on_two_hosts(size, cluster)
    assert (ups, downs) == ({"RSI = RR X RSI"}, {"RR(PI) = RSI X SIR"})
    across = {"up": "S0S1 = S0R X RS1", "down": "S0R(P1) = S0S1 X S1R"}
    pins = tuple((name, across[name.rpartition("_")[2]]) for name in contractions(wide(size), plan))
    assert on_two_hosts(size, cluster, pins, (2, 2))[0].step_time_s > 10 * plan.step_time_s


# A residual network with a large batch on equal devices.

@pytest.mark.parametrize(("batch", "cluster"), [(256, "4xA100-80GB"), *(pytest.param(*point, marks=SLOW) for point in [
    (512, "4xH200"), (512, "4xV100"), (256, "4xPCIe-A100"), (1024, "4xRTX-4090")])])
def test_convolutions_of_a_residual_network_cut_the_batch(batch: int, cluster: str) -> None:
    context, plan = named("resnet50", batch, None), planned("resnet50", batch, None, cluster)
    found = contractions(context, plan)
    convolutions = {name: strategy for name, strategy in found.items() if name != "fc"}
    assert plan.mesh == (2, 2) and len(convolutions) == 53
    assert set(convolutions.values()) == {"S01R = S01R X RR"}
