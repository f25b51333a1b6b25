"""Assembly equals brute force on random small instances, and refuses what can't be."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from autopar.core.assembly import Bond, Entry, Instance, Place, Run, Taken, Tie, price, waits
from autopar.core.errors import Infeasible
from autopar.solver.assembly import assemble, solved


def instance_of(seed: int) -> Instance:
    """Two to six segments in up to three runs of up to two entries, on up to four stages."""
    draw = random.Random(seed)
    runs = tuple(Run(f"r{r}", draw.randint(1, 3), tuple(
        Entry(draw.uniform(0.1, 2), draw.uniform(0.1, 4), draw.uniform(0, 1), draw.uniform(1, 9) * 1e9,
              draw.uniform(0, 3) * 1e9, draw.choice([0.0, 1e9])) for _ in range(draw.randint(1, 2))),
        draw.uniform(0, 2), draw.uniform(0, 2)) for r in range(draw.randint(1, 3)))
    total = sum(run.count for run in runs)
    stages = min(total, draw.randint(1, 3 if total > 6 else 4))
    devices = {3: draw.choice([2, 3]), 4: 2}.get(stages, stages)  # the last with the first, or two a device
    budget = draw.choice([math.inf, 20e9, 40e9])
    places = tuple(Place(budget, draw.choice([1.0, 1.0, 1.7]), draw.randint(1, 3), draw.uniform(0, 0.1),
                         draw.uniform(0, 0.2), wait) for wait in waits(stages))
    ties = (Tie(0, len(runs) - 1, draw.uniform(0, 3)),) if len(runs) > 1 and draw.random() < 0.6 else ()
    micro_batches = draw.randint(1, 6)
    at = draw.randrange(total)
    bonds = (Bond(at, draw.randrange(at, total), "b"),) if draw.random() < 0.3 else ()
    return Instance(runs, places, micro_batches, ties, devices, bonds)


def every(instance: Instance) -> Iterator[Taken]:
    """All contiguous stages with every choice of entries."""
    where = [r for r, run in enumerate(instance.runs) for _ in range(run.count)]
    for bounds in itertools.combinations(range(1, len(where)), len(instance.places) - 1):
        if any(map(instance.bond, bounds)):
            continue
        parts = [where[a:b] for a, b in itertools.pairwise((0, *bounds, len(where)))]
        for entries in itertools.product(*(range(len(instance.runs[r].entries)) for part in parts for r in part)):
            left = iter(entries)
            chosen = [[(r, next(left)) for r in part] for part in parts]
            yield tuple(tuple(tuple(sum((r, e) == each for each in part) for e in range(len(run.entries)))
                              for r, run in enumerate(instance.runs)) for part in chosen)


def brute_force(instance: Instance) -> float:
    """The least seconds of any stages that fit, infinite where none do."""
    found = (price(instance, taken) for taken in every(instance))
    return min((p.seconds for p in found if all(held <= instance.places[d].budget
                                                for d, held in enumerate(p.held))), default=math.inf)


@pytest.mark.parametrize("block", range(20))
def test_assembly_is_the_best_of_all(block: int) -> None:
    """240 instances, of which the solver takes milliseconds each."""
    for seed in range(12 * block, 12 * block + 12):
        instance, wanted = instance_of(seed), brute_force(instance_of(seed))
        if math.isinf(wanted):
            for way in (assemble, solved):
                with pytest.raises(Infeasible, match=r"GiB|share buffers"):
                    way(instance)
        else:
            for way in (assemble, solved):
                found = way(instance)
                assert found.priced.seconds == pytest.approx(wanted, rel=1e-6), seed
                assert found.bound == pytest.approx(wanted, rel=1e-6)


def test_equal_layers_are_counted() -> None:
    """96 layers on 16 stages take no longer to solve than a few."""
    layer = Run("h", 96, (Entry(1.0, 2.0, 0.1, 1e9, 1e9),))
    runs = (Run("embedding", 1, (Entry(0.1, 0.2),)), layer, Run("head", 1, (Entry(0.8, 1.6),)))
    found = assemble(Instance(runs, tuple(Place(wait=wait) for wait in waits(16)), 32))
    assert found.gap == 0.0
    assert found.priced.period == pytest.approx(20.4)  # six layers and the head


def test_recomputation_is_where_it_is_needed_most() -> None:
    """48 layers of five entries on 24 stages: what is kept for more micro-batches is kept less."""
    layer = Run("h", 48, tuple(Entry(1.0, 2.0 + again, 0.1, 1e9, (4 - 4 * again) * 1e8, 1e8 * again)
                               for again in (0.0, 0.2, 0.4, 0.7, 0.9)))
    runs = (Run("embedding", 1, (Entry(0.1, 0.2),)), layer, Run("head", 1, (Entry(0.8, 1.6),)))
    places = tuple(Place(5e9, flight=24 - j, wait=wait) for j, wait in enumerate(waits(24)))
    found = assemble(Instance(runs, places, 96))
    again = [sum(e * n for e, n in enumerate(stage[1])) for stage in found.taken]
    assert again[0] > again[-1] == 0
    assert all(held <= 5e9 for held in found.priced.held)


def test_more_stages_than_segments_are_refused() -> None:
    instance = Instance((Run("h", 2, (Entry(1.0, 2.0),)),), (Place(),) * 3, 4)
    with pytest.raises(Infeasible, match="3 stages are asked for, the program has 2 segments"):
        assemble(instance)


def test_a_buffer_that_is_written_in_every_segment_is_in_one_stage() -> None:
    instance = Instance((Run("h", 4, (Entry(1.0, 2.0),)),), (Place(),) * 3, 4, bonds=(Bond(0, 2, "norm.mean"),))
    with pytest.raises(Infeasible, match=r"\(norm.mean\); use at most 2 stages"):
        assemble(instance)
    taken = assemble(replace(instance, places=(Place(),) * 2, devices=2)).taken
    assert [stage[0][0] for stage in taken] == [3, 1]


def test_a_slow_device_gets_fewer_layers() -> None:
    runs = (Run("h", 12, (Entry(1.0, 2.0),)),)
    places = tuple(Place(slow=slow) for slow in (1.0, 2.0, 1.0))
    taken = assemble(Instance(runs, places, 64)).taken
    assert [stage[0][0] for stage in taken] == [5, 2, 5]


def test_a_small_memory_gets_fewer_layers() -> None:
    runs = (Run("h", 8, (Entry(1.0, 2.0, static=1e9),)),)
    instance = Instance(runs, (Place(2e9), Place(9e9)), 4)
    assert [stage[0][0] for stage in assemble(instance).taken] == [2, 6]
    with pytest.raises(Infeasible, match="raise the budget"):
        assemble(replace(instance, places=(Place(2e9), Place(5e9))))
