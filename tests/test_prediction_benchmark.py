"""benchmarks/prediction.py and benchmarks/errors.py: a small sweep that goes on where it was, and its errors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.errors import Row, claims, rank_correlation, read, regret, table
from tests.pool import Pool

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
GROUP = ("gpt2", "shm", 4)


def row(mode: str, predicted: float, measured: float, use: str = "claim", predicted_bytes: float = 1.0) -> Row:
    """A plan that takes a byte."""
    return Row(GROUP, mode, "4", use, predicted, measured, predicted_bytes, 1.0)


def test_errors() -> None:
    rows = [row("ddp", 1.02, 1.0), row("zero2", 1.1, 1.2, predicted_bytes=0.95), row("1d", 9.0, 1.0, "fit")]
    said = claims(rows)
    assert "2 plans not used to fit, of 3" in said
    assert "time, median error: 5.2%, goal 3%, NOT met" in said  # 2 % and 8.3 %
    assert "time, worst error: 8.3%, goal 8%, NOT met" in said
    assert "memory, worst under: 5.0%, goal 2%, NOT met" in said
    assert "regret 0.0%, met" in said
    assert "| gpt2 | shm | 4 | zero2 | 4 | 1100.0 | 1200.0 | -8.3% |" in table(rows)


@pytest.mark.parametrize(("predicted", "measured", "correlation", "lost"), [
    ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 1.0, 0.0), ((3.0, 2.0, 1.0), (4.0, 5.0, 6.0), -1.0, 0.5),
    ((1.0, 1.0, 1.0), (4.0, 5.0, 6.0), None, 0.0),
])
def test_order(predicted: tuple[float, ...], measured: tuple[float, ...], correlation: float | None,
               lost: float) -> None:
    rows = [row(str(n), *both) for n, both in enumerate(zip(predicted, measured, strict=True))]
    found = rank_correlation(rows)
    assert found == correlation if correlation is None else found == pytest.approx(correlation)
    assert regret(rows) == pytest.approx(lost)


def _sweep(rank: int, world_size: int, folder: str, words: list[str]) -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    from prediction import parsed, sweep  # type: ignore[import-not-found]
    sweep(parsed([*words, "--out", folder, "--cluster", "cpu:2", "--precision", "fp32", "--costs", "roofline"]))


def test_a_small_sweep_goes_on_where_it_was(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    jobs = ["gpt2-tiny-1x32:ddp", "gpt2-tiny-1x32:zero3"]
    pool(2).run(_sweep, str(tmp_path), jobs[:1])
    path = tmp_path / "prediction-nvlink.jsonl"
    before = path.read_text()
    pool(2).run(_sweep, str(tmp_path), jobs)
    assert path.read_text().startswith(before)
    rows = read([path])
    assert [found.mode for found in rows] == ["ddp", "zero3"]
    assert all(found.measured_s > 0 and found.measured_bytes > 0 for found in rows)
    assert (tmp_path / "plan-nvlink-gpt2-tiny-1x32-ddp.json").exists()
