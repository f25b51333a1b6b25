"""Clusters: presets, figures of collectives against sums by hand, files, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from autopar.core.cluster import Cluster
from autopar.core.device import Device, Flops
from autopar.core.errors import AutoparError, UnknownName
from autopar.core.mesh import Mesh
from autopar.core.presets import MACHINES, MOST_DEVICES
from autopar.core.reshard import Cargo, Primitive, cheapest_path
from autopar.core.spec import parse

DEVICE = Device("toy", Flops(1e12, 2e12, 4e12), 0.5, 1e9, 1e11, 1e-6)
MEGABYTE = 1e6


def toy(hosts: int, devices: int) -> Cluster:
    """Links of 1 µs and 100 GB/s within a host, 10 µs between, and uplinks of 40 GB/s."""
    rows = tuple(i // devices for i in range(hosts * devices))
    def tiers(within: float, between: float) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(within if i == j else between for j in range(hosts)) for i in range(hosts))
    return Cluster("toy", (DEVICE,) * len(rows), rows, rows, tiers(1e-6, 10e-6), tiers(100e9, 40e9), (40e9,) * hosts)


@pytest.mark.parametrize(("text", "devices", "hosts", "kind"), [
    ("8xA100-80GB", 8, 1, "A100-80GB"), ("2x8xA100-80GB", 16, 2, "A100-80GB"), ("4xH200", 4, 1, "H200"),
    ("1x2xv100", 2, 1, "V100"), ("3x4xrtx-4090", 12, 3, "RTX-4090"), ("2xPCIe-A100", 2, 1, "PCIe-A100"),
    ("cpu:4", 4, 1, "cpu"), ("CPU:1", 1, 1, "cpu"), ("128x8xH100", 1024, 128, "H100"),
])
def test_preset(text: str, devices: int, hosts: int, kind: str) -> None:
    cluster = Cluster.preset(text)
    assert (cluster.size, len(set(cluster.hosts)), cluster.devices[0].kind) == (devices, hosts, kind)
    assert cluster.name == text
    assert Cluster.from_json(json.loads(json.dumps(cluster.to_json()))) == cluster


@pytest.mark.parametrize("text", ["", "8", "A100-80GB", "0xH100", "0x8xH100", "2x2x2xH100", "cpu", "cpu:0", "2xcpu:4",
                                  "8 x H100", "2000x8xH100", "-1xH100"])
def test_preset_of_another_form(text: str) -> None:
    with pytest.raises(AutoparError, match=r"\[nodes x\] devices x type.*A100-40GB.*V100"):
        Cluster.preset(text)


def test_preset_of_unknown_type() -> None:
    with pytest.raises(UnknownName, match=r"'A100'; known: A100-40GB, A100-80GB, H100"):
        Cluster.preset("8xA100")


@pytest.mark.parametrize("kind", MACHINES)
def test_published_order_of_links(kind: str) -> None:
    cluster = Cluster.preset(f"2x2x{kind}")
    assert cluster.latency(0, 1) < cluster.latency(0, 2)
    assert cluster.bandwidth(0, 1) > cluster.bandwidth(1, 2) == cluster.bandwidth(2, 1)


def test_processes_share_one_machine() -> None:
    one, four = Cluster.preset("cpu:1"), Cluster.preset("cpu:4")
    for cluster in (one, four):
        assert sum(device.memory_bytes for device in cluster.devices) == one.devices[0].memory_bytes
        assert sum(device.matmul_flops("fp32") for device in cluster.devices) == one.devices[0].matmul_flops("fp32")
    seconds = four.collective_seconds("all_reduce", Mesh((4,)), (0,), 100 * MEGABYTE)
    assert 200 * MEGABYTE < 100 * MEGABYTE / seconds < 1000 * MEGABYTE


def test_matmul_flops() -> None:
    assert DEVICE.matmul_flops("bf16") == 1e12
    with pytest.raises(UnknownName, match="known: bf16, fp16, fp32"):
        DEVICE.matmul_flops("int3")  # type: ignore[arg-type]


ONE_HOST: list[tuple[Primitive, tuple[int, ...], float]] = [
    ("all_reduce", (0,), 2 * 1e-6 + 2 / 2 * 1e-5),
    ("all_reduce", (1,), 2 * 3e-6 + 2 * 3 / 4 * 1e-5),
    ("all_reduce", (0, 1), 2 * 7e-6 + 2 * 7 / 8 * 1e-5),
    ("all_gather", (1,), 3e-6 + 3 / 4 * 1e-5),
    ("reduce_scatter", (1,), 3e-6 + 3 / 4 * 1e-5),
    ("all_to_all", (1,), 3e-6 + 3 / 4 * 1e-5),
    ("all_reduce", (), 0.0),
]


@pytest.mark.parametrize(("primitive", "axes", "seconds"), ONE_HOST)
def test_collectives_on_one_host(primitive: Primitive, axes: tuple[int, ...], seconds: float) -> None:
    assert toy(1, 8).collective_seconds(primitive, Mesh((2, 4)), axes, MEGABYTE) == pytest.approx(seconds)


# Two hosts of 4; a megabyte takes 10 µs within a host and 25 µs over an uplink that nobody shares.
TWO_HOSTS: list[tuple[tuple[int, ...], Primitive, tuple[int, ...], float]] = [
    ((2, 4), "all_reduce", (1,), 2 * 3e-6 + 2 * 3 / 4 * 10e-6),           # within hosts
    ((2, 4), "all_reduce", (0,), 2 * 10e-6 + 2 / 2 * 4 * 25e-6),          # 4 groups cross at once
    ((2, 4), "all_gather", (0,), 10e-6 + 1 / 2 * 4 * 25e-6),
    ((8,), "all_reduce", (0,), 2 * 70e-6 + 2 * 7 / 8 * 25e-6),            # one ring, crossing each uplink once
    ((4, 2), "all_reduce", (0,), 2 * 30e-6 + 2 * 3 / 4 * 2 * 25e-6),      # two rings cross
    ((4, 2), "all_to_all", (0,), 30e-6 + 2 * 2 * 2 / 4 * 25e-6),          # 2 devices send 2 of 4 parts, in 2 groups
    ((8,), "all_to_all", (0,), 70e-6 + 4 * 4 / 8 * 25e-6),
    ((2, 2, 2), "all_reduce", (0, 2), 2 * 30e-6 + 2 * 3 / 4 * 2 * 25e-6),
]


@pytest.mark.parametrize(("shape", "primitive", "axes", "seconds"), TWO_HOSTS)
def test_collectives_on_two_hosts(shape: tuple[int, ...], primitive: Primitive, axes: tuple[int, ...],
                                  seconds: float) -> None:
    assert toy(2, 4).collective_seconds(primitive, Mesh(shape), axes, MEGABYTE) == pytest.approx(seconds)


def test_order_of_devices_on_the_mesh_counts() -> None:
    cluster, across = toy(2, 2), Mesh((2, 2), (0, 2, 1, 3))
    assert cluster.collective_seconds("all_reduce", across, (0,), MEGABYTE) == pytest.approx(2e-6 + 10e-6)
    assert cluster.collective_seconds("all_reduce", across, (1,), MEGABYTE) == pytest.approx(20e-6 + 2 * 25e-6)


def test_ring_goes_host_by_host() -> None:
    scattered = Mesh((4,), (0, 2, 1, 3))
    assert toy(2, 2).collective_seconds("all_reduce", scattered, (0,), MEGABYTE) == pytest.approx(60e-6 + 1.5 * 25e-6)


def test_slowest_link_of_the_worst_group_counts() -> None:
    cluster = toy(1, 4)
    latency = tuple(tuple(5e-6 if {i, j} == {2, 3} else 1e-6 for j in range(4)) for i in range(4))
    rates = tuple(tuple(50e9 if {i, j} == {2, 3} else 100e9 for j in range(4)) for i in range(4))
    measured = dataclasses.replace(cluster, rows=(0, 1, 2, 3), latency_s=latency, bytes_per_s=rates)
    assert measured.collective_seconds("all_gather", Mesh((2, 2)), (1,), MEGABYTE) == pytest.approx(5e-6 + 10e-6)
    assert measured.collective_seconds("all_gather", Mesh((2, 2)), (0,), MEGABYTE) == pytest.approx(1e-6 + 5e-6)


def test_pricer_prices_reshards() -> None:
    cluster, mesh = Cluster.preset("2x4xA100-80GB"), Mesh((2, 4))
    price = cluster.pricer(mesh)
    again = Cluster.preset("2x4xA100-80GB").pricer(Mesh((2, 4)))
    assert price == again
    assert hash(price) == hash(again)
    assert price != cluster.pricer(Mesh((4, 2)))
    assert price != cluster.pricer(Mesh((2, 4), (1, 0, 2, 3, 4, 5, 6, 7)))
    path = cheapest_path(parse("S0R"), parse("RR"), mesh, Cargo(MEGABYTE), price)
    assert path.forward == price("all_gather", (0,), MEGABYTE)


def test_mesh_beyond_the_cluster() -> None:
    with pytest.raises(AutoparError, match="needs device 7, but cluster 4xH100"):
        Cluster.preset("4xH100").pricer(Mesh((8,)))


def test_unequal_devices_survive_files(tmp_path: Path) -> None:
    mixed = dataclasses.replace(toy(2, 2), devices=(DEVICE, DEVICE, dataclasses.replace(DEVICE, kind="other"), DEVICE))
    mixed.save(tmp_path / "cluster.json")
    assert Cluster.load(tmp_path / "cluster.json") == mixed
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.json"]


def test_key_names_the_contents() -> None:
    cluster = toy(2, 2)
    assert cluster.key() == dataclasses.replace(cluster, name="other").key()
    assert cluster.key() != dataclasses.replace(cluster, uplink_bytes_per_s=(40e9, 41e9)).key()
    assert len(cluster.key()) == 12


def broken(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """The toy cluster's JSON with `value` at `path`, or without that entry when `value` is None."""
    data: dict[str, Any] = json.loads(json.dumps(toy(2, 2).to_json()))
    inner: Any = data
    for step in path[:-1]:
        inner = inner[step]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


@pytest.mark.parametrize(("path", "value", "message"), [
    (("format",), "autopar cluster 0", "'format' is 'autopar cluster 0'"),
    (("name",), None, "'name' is missing"),
    (("latency_s",), None, "'latency_s' is missing"),
    (("latency_s", 0, 1), -1e-6, r"latency_s\[0\]\[1\] is -1e-06, needed is a finite number above 0"),
    (("latency_s", 0, 1), "fast", r"latency_s\[0\]\[1\] is 'fast', needed is one of type float"),
    (("bytes_per_s", 1, 0), math.inf, r"bytes_per_s\[1\]\[0\] is inf"),
    (("bytes_per_s", 1), [1e9], "needed are 2 of 2"),
    (("bytes_per_s",), [], "needed are 2 of 2"),
    (("uplink_bytes_per_s", 0), 0, r"uplink_bytes_per_s\[0\] is 0.0"),
    (("hosts", 3), 2, r"hosts has 4 entries from 0 to 2, needed are 4, one a device, from 0 to 1"),
    (("rows",), [0], r"rows has 1 entries"),
    (("hosts",), [0], r"counts of devices come to 4, needed is one a host entry, 1"),
    (("devices", 0, "count"), 10 ** 12, "come to 1000000000000"),
    (("devices", 0, "count"), -4, "count of devices is -4"),
    (("devices", 0, "count"), True, "'count' is True, needed is one of type int"),
    (("devices", 0, "memory_bytes"), None, "'memory_bytes' is missing"),
    (("devices", 0, "memory_bytes"), -1, "memory_bytes of device toy is -1"),
    (("devices", 0, "efficiency"), 1.5, "efficiency of device toy is 1.5"),
    (("devices", 0, "peak_flops_per_s", "bf16"), None, "'bf16' is missing"),
    (("devices",), [], "come to 0"),
    (("latency_s", 0, 1), math.nan, r"latency_s\[0\]\[1\] is nan, needed is a finite"),
    (("latency_s", 1, 0), 1e300, r"latency_s\[1\]\[0\] is 1e\+300, needed is a figure from 1e-12 to 100; see whether"),
    (("bytes_per_s", 0, 1), 1e-320, r"bytes_per_s\[0\]\[1\] is .*needed is a figure from 1 to 1e\+16"),
    (("bytes_per_s", 0, 1), 10**400, "too large"),
    (("uplink_bytes_per_s", 1), 1e17, r"uplink_bytes_per_s\[1\] is 1e\+17, needed is a figure"),
    (("latency_s", 0), None, "rows has 4 entries from 0 to 1"),
    (("latency_s", 0, 1), None, r"latency_s has rows of \[1, 2\] entries"),
    (("latency_s", 0, 1), "\u2603", "is '\u2603', needed is one of type float"),
    (("devices", 0, "launch_s"), 1e3, "launch_s of device toy is 1000, needed is a figure from 1e-12 to 100"),
    (("devices", 0, "efficiency"), 1e-320, "efficiency of device toy is .*needed is a figure from"),
    (("devices", 0, "peak_flops_per_s", "fp16"), 1e21, "peak_flops_per_s of device toy in fp16 is 1e\\+21"),
    (("devices", 0, "memory_bytes"), 0.5, "memory_bytes of device toy is 0.5, needed is a figure from 1 to 1e\\+18"),
    (("devices", 0), {}, "'count' is missing; found are no entries"), (("name",), 3, "'name' is 3"),
])
def test_malformed_files_are_refused(tmp_path: Path, path: tuple[str | int, ...], value: Any, message: str) -> None:
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps(broken(path, value)))
    with pytest.raises(AutoparError, match=message) as caught:
        Cluster.load(file)
    assert "cluster.json is not a cluster" in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [
    ("{\"format\": ", "is not JSON"), ("[1]", "holds a list"), ("", "JSON"), ("null", "holds a NoneType"),
    ("{}", "'format' is missing; found are no entries"),
    ("[" * 100_000, "cluster.json is not a cluster: it holds lists within lists"), ("\x00", "is not JSON"),
])
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "cluster.json"
    file.write_text(text)
    with pytest.raises(AutoparError, match=message):
        Cluster.load(file)


@pytest.mark.parametrize("path", [3, None, b"cluster.json", 3.5, ["cluster.json"], ""])
def test_paths_of_no_file(path: Any) -> None:
    for use in (Cluster.load, toy(1, 2).save):
        with pytest.raises(AutoparError, match=r"the path of a cluster is .*, needed is a path"):
            use(path)


@pytest.mark.parametrize("text", [3, None, b"cpu:4", 4.5, ["cpu:4"], Path("cpu:4")])
def test_presets_that_are_no_text(text: Any) -> None:
    with pytest.raises(AutoparError, match=r"cluster is .*, needed is the text of a preset"):
        Cluster.preset(text)


@pytest.mark.parametrize("data", [[], None, 3, "cluster"])
def test_json_that_is_no_object(data: Any) -> None:
    with pytest.raises(AutoparError, match=r"a cluster is .*, needed is one of type dict"):
        Cluster.from_json(data)


@pytest.mark.parametrize("text", ["cpu:1000000", "1024x1024xH100", "1000000xH100", "cpu:16385", "cpu:" + "9" * 5000])
def test_more_devices_than_can_be_planned_for(text: str) -> None:
    with pytest.raises(AutoparError, match=r"cluster .{,70} has [0-9]{5,12} devices, the most .* 16384") as refusal:
        Cluster.preset(text)
    assert len(str(refusal.value)) < 300


def test_the_most_devices_and_no_more() -> None:
    largest = Cluster.preset("1024x16xH100")
    assert largest.size == MOST_DEVICES
    with pytest.raises(AutoparError, match="has 16385 devices"):
        dataclasses.replace(largest, devices=(*largest.devices, DEVICE))


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(AutoparError, match="cannot read"):
        Cluster.load(tmp_path / "absent.json")
    with pytest.raises(AutoparError, match="cannot write"):
        toy(1, 2).save(tmp_path / "absent" / "cluster.json")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cluster.json"
    toy(1, 2).save(file)
    before = file.read_text()
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(AutoparError, match="No space left"):
        toy(2, 2).save(file)
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.json"]
