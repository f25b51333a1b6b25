"""benchmarks/links.py: the variables of each kind of links, and what is told of a cluster."""

from __future__ import annotations

import dataclasses

import pytest

from autopar.core.cluster import Cluster
from autopar.core.curves import Curve
from autopar.core.measured import Measured
from benchmarks.links import ENVIRONMENTS, NBYTES, bus, report

SMALL_S = 25e-6


@pytest.mark.parametrize(("name", "hosts"), [
    ("nvlink", None), ("shm", None), ("tcp", None), ("two-hosts", "0011"), ("two-hosts-interleaved", "0101"),
])
def test_variables(name: str, hosts: str | None) -> None:
    for rank in range(4):
        variables = ENVIRONMENTS[name].variables(rank, 4)
        assert all(key.startswith("NCCL_") for key in variables)
        assert variables.get("NCCL_HOSTID") == (f"host{hosts[rank]}" if hosts else None)
        assert ("NCCL_SOCKET_IFNAME" in variables) is (name not in ("nvlink", "shm"))


def known(name: str) -> Cluster:
    """Two hosts that do what is known of four H200s under links called so."""
    figures = ENVIRONMENTS[name].known
    def curve(bus_gb_per_s: float, share: float) -> Curve:
        return Curve((1e3, NBYTES), (SMALL_S, share * NBYTES / bus_gb_per_s / 1e9))
    assert figures.across is not None
    base = dataclasses.replace(Cluster.preset("2x2xH200"), bytes_per_s=(
        (figures.within * 1e9, figures.across * 1e9), (figures.across * 1e9, figures.within * 1e9)))
    return dataclasses.replace(base, collectives=(
        Measured("all_reduce", ((0, 1, 2, 3),), curve(figures.all_reduce, 1.5)),
        Measured("all_gather", ((0, 1, 2, 3),), curve(figures.all_gather, 0.75))))


def test_what_is_known_meets_the_claims() -> None:
    cluster = known("two-hosts")
    assert bus(cluster, "all_reduce") == pytest.approx(6.3)
    text = report("two-hosts", cluster, 30.0, True)
    assert text.count(" yes") == 4 and " no\n" not in text
    assert "25 to 25 µs, known 24 to 57" in text and "hosts found: 0 0 1 1, set: 0 0 1 1, recognised" in text


def test_what_is_not_does_not() -> None:
    text = report("two-hosts-interleaved", known("two-hosts"), 30.0, True)
    assert "NOT recognised" in text and " no" in text
    assert " yes" not in report("two-hosts", known("two-hosts"), 30.0, False)
