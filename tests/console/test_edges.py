"""Edge costs as text: every number where it belongs."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from autopar.console.edges import LEGEND, edge_costs
from autopar.core.cluster import Cluster
from autopar.core.sharding import Flow
from autopar.passes.capture import capture
from autopar.passes.problem import Problem, build
from autopar.planner import Request, prepare


class Block(nn.Module):
    """Two linear layers around a non-linearity, with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    """Three equal blocks and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


@pytest.fixture(scope="module")
def problem() -> Problem:
    context = prepare(capture(Net(), ((torch.zeros(8, 4, 16),), {})))
    cluster = Cluster.preset("4xA100-80GB")
    return build(context, Request("net").setting(cluster, (2, 2)))


def read(matrix: str) -> tuple[str, list[str], dict[str, list[str]]]:
    """Header, column labels and rows by label of one printed matrix."""
    header, columns, *rows = matrix.splitlines()
    return header, columns.split(), {row.split()[0]: row.split()[1:] for row in rows}


def flows(problem: Problem) -> list[tuple[Flow, tuple[str, list[str], dict[str, list[str]]]]]:
    legend, *matrices = edge_costs(problem).split("\n\n")
    assert legend == LEGEND
    listed = [flow for segment in problem.instance.segments for flow in segment.flows]
    return list(zip(listed, map(read, matrices), strict=True))


def test_every_flow_has_its_producer_and_consumers(problem: Problem) -> None:
    nodes = problem.instance.nodes
    for flow, (header, _, _) in flows(problem):
        found = re.fullmatch(r"(\S+) -> (.+)  \(into \S+?(?:, \d+ times)?\)", header)
        assert found is not None
        assert found[1] == nodes[flow.producer].name
        assert set(found[2].split(", ")) == {nodes[consumer.node].name for consumer in flow.consumers}


def test_every_spec_has_one_label(problem: Problem) -> None:
    for flow, (_, columns, rows) in flows(problem):
        assert len(rows) == len(set(flow.sources))
        assert len(set(columns)) == len(columns) == len({t for c in flow.consumers for t in c.targets})


def test_numbers_are_the_instance_s_in_microseconds(problem: Problem) -> None:
    for flow, (_, columns, rows) in flows(problem):
        for source, row in enumerate(rows.values()):
            found = [1e-6 * float({"-": "inf", "<0.1": "0.01"}.get(cell, cell)) for cell in row]
            wanted = [f + b for f, b in zip(flow.forward[source], flow.backward[source], strict=True)]
            assert len(columns) == len(found) and found == pytest.approx(wanted, abs=0.06e-6)


def test_staying_as_it_is_costs_nothing_and_moving_does(problem: Problem) -> None:
    met = 0
    for flow, (_, columns, rows) in flows(problem):
        for label, row in rows.items():
            cells = dict(zip(columns, row, strict=True))
            if label in cells:
                assert cells[label] == "0"
                met += 1
            if not flow.parameter and label == "S01RR" and "RRR" in cells:
                assert float(cells["RRR"].lstrip("<")) > 0
    assert met > 20


def test_a_parameter_rests_gathered_or_not(problem: Problem) -> None:
    weights = [rows for _, (header, _, rows) in flows(problem) if header.startswith("blocks.0.up.weight ")]
    assert weights and {"RR", "RR(Z0)", "RR(Z01)", "S0R"} <= set(weights[0])
