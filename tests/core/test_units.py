"""Amounts of memory, against hand-computed bytes."""

import pytest

from autopar.core.errors import AutoparError
from autopar.core.units import BYTES, parse_bytes


@pytest.mark.parametrize(("text", "amount"), [
    ("20GiB", 21_474_836_480), ("80GB", 80_000_000_000), ("512MiB", 536_870_912), ("900MB", 900_000_000),
    ("73600000000", 73_600_000_000), ("1", 1), ("8e10", 80_000_000_000), ("100B", 100), ("1.5GiB", 1_610_612_736),
    (" 20 GiB ", 21_474_836_480), ("20gib", 21_474_836_480), ("20gb", 20_000_000_000), ("0.5GiB", 2**29),
    ("20TiB", 20 * 2**40), ("10kib", 10_240),
])
def test_bytes(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "0GiB", "20Gi", "20PiB", "20 GiB free", "nan", "inf",
                                  "1e999", "0x10", "2,5GiB", "1_000", "\N{ARABIC-INDIC DIGIT TWO}GiB", "two GiB"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(AutoparError, match="20GiB") as refusal:
        parse_bytes(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize("unit", BYTES)
def test_every_unit_reads_in_any_case(unit: str) -> None:
    assert parse_bytes(f"3{unit.lower()}") == parse_bytes(f"3{unit.upper()}") == 3 * BYTES[unit]
