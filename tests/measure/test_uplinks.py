"""What hosts send each other at once, over gloo as if ranks were on hosts."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.measure.crew import assembled
from autopar.measure.pairs import Links
from autopar.measure.tiers import Hosts
from autopar.measure.uplinks import uplinks
from tests.measure.efforts import quick

pytestmark = pytest.mark.dist
ALONE = Links(((1e-5,) * 4,) * 4, ((1.0, 2.0, 3.0, 4.0),) * 4)


def found(rank: int, world_size: int, hosts: Hosts) -> tuple[float, ...]:
    with quick(), assembled() as crew:
        return uplinks(crew, hosts, ALONE)


@pytest.mark.parametrize("hosts", [(0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1), (0, 1, 2, 0)])
def test_hosts_send_to_the_next_all_at_once(hosts: Hosts, pool: Any) -> None:
    said = pool(4).run(found, hosts)
    assert len(set(said)) == 1 and len(said[0]) == max(hosts) + 1
    assert all(1e5 < rate < 1e12 for rate in said[0])
    for h, rate in enumerate(said[0]):
        assert rate / hosts.count(h) == pytest.approx(said[0][0] / hosts.count(0)), "each device sends the same"


def test_one_host_sends_what_its_links_carry(pool: Any) -> None:
    assert pool(4).run(found, (0, 0, 0, 0)) == [(4.0 + 4.0 + 4.0 + 3.0,)] * 4
