"""The smallest changes that would fit."""

from __future__ import annotations

import pytest

from autopar.core.errors import Parts
from autopar.remedies import Asked, remedies


@pytest.mark.parametrize(("rest", "step", "asked", "told"), [
    (40.0, 100.0, Asked(100.0, 8, 1, "auto", "bf16-mixed"),
     "raise the budget to 140 bytes, or use a batch of about 4 in the place of 8, or use about 2 devices in the place "
     "of 1"),
    (200.0, 10.0, Asked(100.0, 8, 1, "auto", "bf16-mixed"),
     "raise the budget to 210 bytes, or use about 4 devices in the place of 1"),
    (200.0, 10.0, Asked(100.0, 8, 4, "ddp", "bf16-mixed"),
     "raise the budget to 210 bytes, or use mode auto in the place of ddp"),
    (20.0, 100.0, Asked(100.0, 3, 1, "auto", "fp32"),
     "raise the budget to 120 bytes, or use precision bf16-mixed, or use a batch of about 2 in the place of 3"),
    (200.0, 10.0, Asked(100.0, 3, 1, "ddp", "bf16-mixed"),
     "raise the budget to 210 bytes; a smaller batch alone is not enough"),
])
def test_what_would_fit(rest: float, step: float, asked: Asked, told: str) -> None:
    assert remedies(rest + step, Parts(rest, step), asked) == told
