"""A link that is slow in truth: it is found, and its rate is what it was set to."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest

from tests.namespaces import NoNamespaces, joined

BITS_PER_S = 100e6
SLOW = (1, 2)
SCRIPT = """\
import json, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
from autopar import launch
from autopar.measure.crew import assembled
from autopar.measure.pairs import links
from autopar.measure.tiers import recognised
launch.init()
with assembled() as crew:
    found = links(crew, lambda: None)
    if crew.rank == 0:
        print(json.dumps([found.bytes_per_s, recognised(found).hosts, recognised(found).rows]))
"""


@pytest.mark.slow
@pytest.mark.dist
def test_a_slow_link_among_fast_ones_is_found() -> None:
    script = SCRIPT.format(root=str(Path(__file__).parents[2]))
    try:
        with joined(4, {SLOW: BITS_PER_S}) as spaces:
            done = spaces.run([sys.executable, "-c", script], 200)
    except NoNamespaces as error:
        pytest.skip(f"no network namespaces here: {error}")
    assert [each.returncode for each in done] == [0] * 4, "\n".join(each.stderr for each in done)
    rates, hosts, rows = json.loads(done[0].stdout.splitlines()[-1])
    pairs = {(i, j): rates[i][j] for i in range(4) for j in range(4) if i != j}
    assert {tuple(sorted(pair)) for pair in sorted(pairs, key=pairs.__getitem__)[:2]} == {SLOW}
    for pair in (SLOW, SLOW[::-1]):
        assert pairs[pair] == pytest.approx(BITS_PER_S / 8, rel=0.1)
    assert statistics.median(pairs.values()) > 2 * BITS_PER_S / 8
    assert (hosts, rows) == ([0] * 4, [0, 1, 2, 3]), "one slow link among fast ones makes no host"
