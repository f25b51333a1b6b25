"""What a rank is told where the others don't meet it."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from autopar.codegen import control
from autopar.codegen.control import How
from autopar.core.errors import AutoparError, RankLost

CLOSED = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1733\nand more"


@pytest.mark.parametrize(("away", "said"), [
    ({}, "rank 0 can't go on: the connection to another rank was closed"),
    ({2: "left"}, "rank 2 was closed: it has ended"), ({1: "silent"}, "rank 1 does not answer: nothing .* 40 s, its"),
    ({2: "left", 1: "lost", 0: "lost"}, "rank 1 is gone: its process has ended by an error or a signal")])
@pytest.mark.parametrize("error", [RuntimeError(CLOSED), dist.DistBackendError(CLOSED)])
def test_who_is_away(monkeypatch: pytest.MonkeyPatch, away: dict[int, How], said: str, error: RuntimeError) -> None:
    monkeypatch.setattr(control, "_away", {})
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    for rank, how in away.items():
        control.note_away(rank, how)
    with pytest.raises(RankLost, match=said) as found, control.all_there():
        raise error
    assert found.value.__cause__ is error and str(found.value).endswith("127.0.0.1]:1733)")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), AutoparError("gloo"), ValueError("gloo")])
def test_other_errors_are_left_alone(error: Exception) -> None:
    with pytest.raises(type(error)) as found, control.all_there():
        raise error
    assert found.value is error
