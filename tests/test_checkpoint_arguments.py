"""What is given to save and load a checkpoint is looked at before any rank waits for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from autopar.checkpoint import latest, load, save
from autopar.core.errors import AutoparError


class Compiled(nn.Module):
    """As much of a compiled model as is looked at."""

    def random_state(self) -> dict[str, int]:
        return {}


@pytest.mark.parametrize(("folder", "model", "optimizer", "said"), [
    (3, Compiled(), None, "the folder of checkpoints is 3, of type int, needed is a path"),
    (None, Compiled(), None, "the folder of checkpoints is None"), (b"run", Compiled(), None, "is b'run'"),
    ("", Compiled(), None, "the folder of checkpoints is ''"), ("run", nn.Linear(2, 2), None, "Linear has no plan yet"),
    ("run", None, None, "NoneType has no plan yet"),
    ("run", Compiled(), "adamw", "optimizer is 'adamw', of type str, needed is a torch.optim.Optimizer or None"),
])
def test_what_makes_no_sense_is_refused(folder: Any, model: Any, optimizer: Any, said: str, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for act in (save, load):
        with pytest.raises(AutoparError, match=said):
            act(folder, model, optimizer)
    assert list(tmp_path.iterdir()) == []


def test_folders_without_checkpoints(tmp_path: Path) -> None:
    assert latest(tmp_path) is None and latest(tmp_path / "absent") is None
    with pytest.raises(AutoparError, match="the folder of checkpoints is 3"):
        latest(3)  # type: ignore[arg-type]
