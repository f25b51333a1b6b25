"""Schedules: every micro-batch once through every stage, in an order that runs, keeping what is said."""

from __future__ import annotations

from collections import Counter

import pytest

from autopar.core.errors import AutoparError
from autopar.core.schedules import Pipe, Schedule, Timing, actions, arrivals, in_flight, played

PIPES: list[tuple[Schedule, Pipe]] = [
    *((name, Pipe(n, n, m)) for name in ("gpipe", "1f1b") for n in (1, 2, 3, 4, 8) for m in (1, 2, 5, 8)),
    *(("interleaved", Pipe(v * p, p, m * p)) for p in (2, 4) for v in (2, 3) for m in (1, 2, 3)),
    *(("looped", Pipe(p + 1, p, m)) for p in (2, 3, 4, 8) for m in (1, 2, 5, 16)),
]


def even(pipe: Pipe) -> Timing:
    """Equal stages whose messages take no time."""
    return Timing((1.0,) * pipe.stages, (2.0,) * pipe.stages, (0.0,) * (pipe.stages - 1))


@pytest.mark.parametrize(("name", "pipe"), PIPES, ids=str)
def test_every_action_runs_once_and_in_order(name: Schedule, pipe: Pipe) -> None:
    spans = played(name, pipe, even(pipe))
    assert Counter(span.action for span in spans) == Counter(
        action for device in range(pipe.devices) for action in actions(name, pipe, device))
    assert len(spans) == 2 * pipe.stages * pipe.micro_batches
    for device in range(pipe.devices):
        for stage in range(device, pipe.stages, pipe.devices):
            for phase in ("forward", "backward"):
                order = [a.micro for a in actions(name, pipe, device) if (a.stage, a.phase) == (stage, phase)]
                assert sorted(order) == list(range(pipe.micro_batches))


@pytest.mark.parametrize(("name", "pipe"), PIPES, ids=str)
def test_messages_arrive_in_the_order_they_are_awaited(name: Schedule, pipe: Pipe) -> None:
    """Ways keep an order: what one stage sends over a cut the next takes in the same."""
    def order(stage: int, phase: str) -> list[int]:
        return [a.micro for a in actions(name, pipe, stage % pipe.devices) if (a.stage, a.phase) == (stage, phase)]
    for stage in range(pipe.stages - 1):
        for phase in ("forward", "backward"):
            assert order(stage, phase) == order(stage + 1, phase)


@pytest.mark.parametrize(("name", "pipe"), PIPES, ids=str)
def test_what_comes_begins_to_before_it_is_needed_and_in_the_order_it_is_sent(name: Schedule, pipe: Pipe) -> None:
    for device, coming in enumerate(arrivals(name, pipe)):
        order = actions(name, pipe, device)
        begun = {action: place for place, some in enumerate(coming) for action in some}
        assert all(place <= order.index(action) for action, place in begun.items())
        needed = {a for a in order if (a.stage > 0 if a.phase == "forward" else a.stage < pipe.stages - 1)}
        assert set(begun) == (needed if pipe.devices > 1 else set())
        for action in begun:
            assert [a.micro for a in begun if (a.phase, a.stage) == (action.phase, action.stage)] == sorted(
                a.micro for a in begun if (a.phase, a.stage) == (action.phase, action.stage))


@pytest.mark.parametrize(("stages", "parts"), [(2, 4), (4, 8), (4, 2), (8, 16)])
def test_one_forward_one_backward_is_as_the_formula_says(stages: int, parts: int) -> None:
    pipe = Pipe(stages, stages, parts)
    for name in ("gpipe", "1f1b"):
        assert max(span.end_s for span in played(name, pipe, even(pipe))) == pytest.approx(3.0 * (parts + stages - 1))
    assert [in_flight("1f1b", pipe, j) for j in range(stages)] == [min(parts, stages - j) for j in range(stages)]
    assert in_flight("gpipe", pipe, 0) == parts


@pytest.mark.parametrize("devices", [2, 4])
def test_a_loop_wastes_little(devices: int) -> None:
    """The first stage is shorter by what the last takes on its device."""
    pipe, last = Pipe(devices + 1, devices, 32), 0.1
    lengths = (1.0 - last, *(1.0,) * (devices - 1), last)
    timing = Timing(lengths, tuple(2.0 * each for each in lengths), (0.05,) * devices)
    least = 3.0 * (pipe.micro_batches + devices - 1)
    assert max(span.end_s for span in played("looped", pipe, timing)) <= 1.03 * least


@pytest.mark.parametrize(("name", "pipe", "said"), [
    ("interleaved", Pipe(8, 4, 6), "here are 6; use 8, or 1f1b"),
    ("1f1b", Pipe(4, 2, 4), "one stage a device, here are 2; use interleaved"),
    ("looped", Pipe(4, 2, 4), "one stage more than devices, here are 4 on 2"),
    ("zigzag", Pipe(2, 2, 4), "unknown schedule 'zigzag'"),
])
def test_what_can_not_be_is_refused(name: Schedule, pipe: Pipe, said: str) -> None:
    with pytest.raises(AutoparError, match=said):
        actions(name, pipe, 0)
