"""What a plan is made for when nothing says so."""

from __future__ import annotations

import pytest

from autopar.console import command


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 2), (3, 2), (6, 4), (8, 8), (96, 8), (None, 1)])
def test_cores_that_count(cores: int | None, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.this_machine().name == f"cpu:{processes}"


def test_gpus_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(command, "local_cluster", asked.append)
    command.this_machine()
    assert asked == [4]
