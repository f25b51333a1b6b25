"""A cluster measured on local processes: whole, the same on all ranks, and good for planning."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch.distributed as dist

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh
from autopar.measure import cluster as measuring
from autopar.measure.groups import RUN, partitions
from autopar.planner import Request, solve
from tests.measure.efforts import QUICK, quick
from tests.programs import model_context

pytestmark = pytest.mark.dist


def measured(rank: int, world_size: int) -> str:
    with quick():
        return json.dumps(Cluster.measure().to_json())


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_find_the_same(ranks: int, pool: Any) -> None:
    said = pool(ranks).run(measured)
    assert len(set(said)) == 1
    cluster = Cluster.from_json(json.loads(said[0]))
    assert (cluster.size, len(set(cluster.devices)), cluster.name) == (ranks, 1, f"measured {ranks}xcpu")
    assert {(each.primitive, each.groups) for each in cluster.collectives} == \
        {(primitive, groups) for primitive in RUN for groups in partitions(ranks)}
    assert all(1e6 < cluster.bandwidth(i, j) < 1e12 for i in range(ranks) for j in range(ranks))
    for each in cluster.collectives:
        assert each.curve.knot_bytes[0] == QUICK.group_bytes[0]
        assert 1e-6 < each.curve.seconds(64e3) < 1.0
    for shape in ((ranks,), (2, ranks // 2)):
        axes = tuple(range(len(shape)))
        whole = next(each for each in cluster.collectives if each.primitive == "all_reduce" and len(each.groups) == 1)
        assert cluster.collective_seconds("all_reduce", Mesh(shape), axes, 1e5) == whole.curve.seconds(1e5)
    plan, _ = solve(model_context("mlp"), cluster, Request("mlp", solver="highs"))
    assert plan.cluster_key == cluster.key()


def alone(rank: int, world_size: int) -> str:
    try:
        Cluster.measure()
    except AutoparError as error:
        return str(error)
    return "not refused"


def test_one_rank_has_no_links(pool: Any) -> None:
    assert pool(1).run(alone) == ["measuring links needs at least 2 ranks, 1 is running; start as many as there are "
                                  "devices, by torchrun --nproc-per-node N, srun or mpirun"]


def failing(rank: int, world_size: int) -> str:
    """What a rank is told when its part of the work fails as torch's collectives do."""
    def fail(*_: object) -> None:
        raise RuntimeError("Connection closed by peer\nand more")
    with pytest.MonkeyPatch.context() as patch, quick():
        patch.setattr(measuring, "devices", fail)
        return alone(rank, world_size)


def test_a_lost_rank_is_told_in_one_line(pool: Any) -> None:
    for rank, said in enumerate(pool(2).run(failing)):
        assert said == (f"rank {rank} can't go on measuring, most likely as another rank is lost (RuntimeError: "
                        "Connection closed by peer); nothing is written; see what the other ranks say, then measure "
                        "again")


def after(rank: int, world_size: int) -> int:
    """Groups are given back: as many are left as there were."""
    before = len(dist.distributed_c10d._world.pg_map)
    with quick():
        Cluster.measure()
    return len(dist.distributed_c10d._world.pg_map) - before


def test_no_group_is_left_open(pool: Any) -> None:
    assert pool(2).run(after) == [0, 0]


def test_unlike_devices_are_told_apart() -> None:
    cards = [Cluster.preset(f"1x{kind}").devices[0] for kind in ("H200", "H100", "H200")]
    said = measuring.differences(tuple(cards))
    assert said == ("rank 0 2 H200 643 TFLOP/s in bf16, 4.8e+03 GB/s, 131 GiB, rank 1 H100 643 TFLOP/s in bf16, "
                    "3.35e+03 GB/s, 74.5 GiB")
