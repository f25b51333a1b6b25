"""Reshards as they are written do what their modules do, forward and backward."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.codegen.collectives import Reshard
from autopar.codegen.communicator import Communicator
from autopar.codegen.executable import offline
from autopar.codegen.source.ops import Text
from autopar.codegen.source.rank import Rank
from autopar.codegen.source.reshards import reshard_text
from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.core.reshard import Cargo, cheapest_path
from autopar.core.spec import Spec, parse
from tests.simulator import simulate

MESH = Mesh((2, 2))
SIZES, COUNTS = (4, 2, 4, 4), (2, 1, 1)
"""Refined dims, of which the first two are one dim."""
SPECS = ["RRRR", "S0RRR", "RS0RR", "RRS01R", "S1RS0R", "RRRR(P0)", "RRRR(G1)", "S0RRR(P1)", "RRRS1(G0)", "S01RRR"]
PRICE = Cluster.preset("cpu:4").pricer(MESH)


def local(spec: Spec) -> tuple[int, ...]:
    return tuple(size // MESH.extent(axes) for size, axes in zip(SIZES, spec.dims, strict=True))


def joined(refined: tuple[int, ...]) -> tuple[int, ...]:
    return (refined[0] * refined[1], *refined[2:])


def stepped(run: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `run` makes of `x`, and the gradient of a weighted sum of it."""
    x = x.clone().requires_grad_()
    made = run(x)
    (made * torch.arange(1.0, made.numel() + 1).reshape(made.shape)).sum().backward()
    assert x.grad is not None
    return made.detach(), x.grad


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(SPECS, 2)), ids="-".join)
def test_written_reshards_are_the_modules(source: str, target: str) -> None:
    before, after = parse(source), parse(target)
    path = cheapest_path(before, after, MESH, Cargo(4.0 * math.prod(SIZES), True, SIZES), PRICE)
    if not math.isfinite(path.seconds):
        pytest.skip("there is no way")

    def act(communicator: Communicator) -> tuple[Tensor, ...]:
        module = Reshard(path.steps, local(before), joined(local(after)), torch.float32, communicator)
        text = str(reshard_text(module, Text("x"), joined(local(before)), COUNTS, True))
        rank = Rank(communicator, torch.device("cpu"))
        x = torch.rand(joined(local(before)), generator=torch.Generator().manual_seed(
            communicator.group((0, 1)).index))
        return *stepped(module, x), *stepped(lambda x: eval(text, {"x": x, "rank": rank}), x)

    for made, grad, written, written_grad in simulate(MESH, act):
        assert made.shape == written.shape and torch.equal(made, written) and torch.equal(grad, written_grad)


def written(source: str, target: str) -> str:
    before, after = parse(source), parse(target)
    path = cheapest_path(before, after, MESH, Cargo(4.0 * math.prod(SIZES), True, SIZES), PRICE)
    module = Reshard(path.steps, local(before), joined(local(after)), torch.float32, offline(MESH))
    return str(reshard_text(module, Text("x"), joined(local(before)), COUNTS, True))


def test_refined_dims_are_seen_only_where_they_have_to_be() -> None:
    assert written("S0RRR", "RRRR") == 'rank.all_gather(x, over=(0,), dim=0, backward="slice")'
    assert written("RRS0R", "RRRR(G0)") == 'rank.all_gather(x, over=(0,), dim=1, backward="reduce_scatter")'
    assert written("RS0RR", "RRRR") == (
        'rank.all_gather(x.reshape(4, 1, 4, 4), over=(0,), dim=1, backward="slice").reshape(8, 4, 4)')
