"""What makes a device of measured figures, and which devices are equal."""

from __future__ import annotations

import dataclasses

import pytest

from autopar.core.device import Device, Dtype, Flops
from autopar.core.presets import MACHINES
from autopar.measure.devices import described, evened, shared

RATES: dict[Dtype, float] = {"fp32": 50e12, "bf16": 780e12, "fp16": 760e12}
ONE = Device("card", Flops(1e12, 2e12, 2e12), 0.8, 80e9, 2e12, 5e-6)


def scaled(factor: float, kind: str = "card") -> Device:
    return dataclasses.replace(ONE, kind=kind, memory_bytes_per_s=factor * ONE.memory_bytes_per_s)


@pytest.mark.parametrize("kind", ["H200", "card"])
def test_matmuls_reach_what_was_measured(kind: str) -> None:
    device = described(kind, RATES, {dtype: 1.1 * rate for dtype, rate in RATES.items()}, (1e11, 4e12), 5e-6)
    assert all(device.matmul_flops(dtype) == pytest.approx(rate) for dtype, rate in RATES.items())


def test_a_known_card_has_its_published_peak() -> None:
    device = described("H200", RATES, RATES, (1e11, 4e12), 5e-6)
    assert device.peak.bf16 == pytest.approx(MACHINES["H200"].device.peak.bf16)
    assert device.efficiency == pytest.approx(780 / 989)


def test_the_peak_of_other_cards_is_the_best_that_was_met() -> None:
    device = described("card", RATES, {dtype: 1.25 * rate for dtype, rate in RATES.items()}, (1e11, 4e12), 5e-6)
    assert device.efficiency == pytest.approx(0.8)
    assert device.peak.bf16 == pytest.approx(1.25 * RATES["bf16"])


def test_faster_than_published_is_a_higher_peak() -> None:
    device = described("H200", {"fp32": 50e12, "bf16": 1000e12, "fp16": 989e12}, RATES, (1e11, 4e12), 5e-6)
    assert device.efficiency == 1.0 and device.peak.bf16 == 1000e12


def test_devices_that_are_alike_are_equal() -> None:
    found = evened((scaled(0.98), scaled(1.0), scaled(1.05), scaled(1.01)))
    assert len(set(found)) == 1
    assert found[0].memory_bytes_per_s == pytest.approx(1.005 * ONE.memory_bytes_per_s)
    assert all(found[0].matmul_flops(dtype) == pytest.approx(ONE.matmul_flops(dtype)) for dtype in RATES)


def test_devices_that_are_not_stay_what_they_are() -> None:
    slow, other = (scaled(1.0), scaled(0.7)), (scaled(1.0), scaled(1.0, "old"), scaled(1.02))
    assert evened(slow) == slow
    kinds = evened(other)
    assert kinds[1] == other[1] and kinds[0] == kinds[2] != kinds[1]


def test_processes_of_a_host_are_one_device() -> None:
    found = shared((scaled(1.0), scaled(3.0), scaled(0.1), scaled(0.2)), ("a", "a", "b", "b"))
    assert found[0] == found[1] != found[2] == found[3]
    assert found[0].memory_bytes_per_s == pytest.approx(2.0 * ONE.memory_bytes_per_s)
