"""Joining the other ranks: what is refused, from arguments and from launchers."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import autopar
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.launch import LAUNCHERS, init, local_cluster, strangeness

VARIABLES = {name for names in LAUNCHERS.values() for name in names} | {"MASTER_ADDR", "MASTER_PORT"}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No launcher, no GPU, and no group that is left behind."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not dist.is_initialized()
    yield monkeypatch
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(("given", "said"), [
    ({"rank": 0}, "world_size is None, of type NoneType, needed is a whole number from 1"),
    ({"world_size": 2}, "rank is None, of type NoneType, needed is a whole number from 0 to 1"),
    ({"rank": 2, "world_size": 2}, "rank is 2, of type int, needed is a whole number from 0 to 1; give both"),
    ({"rank": -1, "world_size": 2}, "rank is -1"), ({"rank": 0, "world_size": 0}, "world_size is 0"),
    ({"rank": "0", "world_size": 2}, "rank is '0', of type str"), ({"rank": 0, "world_size": 2.0}, "world_size is 2.0"),
    ({"rank": True, "world_size": 2}, "rank is True"),
    ({"rank": 0, "world_size": 1, "port": 0}, "port is 0, of type int, needed is a whole number from 1 to 65535"),
    ({"rank": 0, "world_size": 1, "port": 70000}, "port is 70000"),
    ({"rank": 0, "world_size": 1, "port": "x"}, "port is 'x'"),
    ({"rank": 0, "world_size": 1, "host": 3}, "host is 3"), ({"rank": 0, "world_size": 1, "host": ""}, "host is ''"),
    ({"port": 29501}, "given without rank and world_size"), ({"host": "a"}, "host a and port None are given without"),
    ({"backend": "mpi"}, "unknown backend 'mpi'; known: gloo, nccl"), ({"backend": 3}, "unknown backend 3"),
    ({"backend": "nccl"}, "backend nccl needs a GPU"),
])
def test_arguments_that_make_no_group(given: dict[str, Any], said: str, alone: pytest.MonkeyPatch) -> None:
    with pytest.raises(AutoparError, match=said):
        init(**given)
    assert not dist.is_initialized()


@pytest.mark.parametrize(("said_by", "values", "said"), [
    ("torchrun", ("x", "2", "0"), "RANK is 'x', of type str, needed is a whole number from 0 to 1; .*start with"),
    ("torchrun", ("2", "2", "0"), "RANK is 2"), ("torchrun", ("0", "0", "0"), "WORLD_SIZE is 0"),
    ("torchrun", ("0", "2", "-1"), "local rank is '-1'"), ("srun", ("1", "", "0"), "SLURM_NTASKS is ''"),
    ("mpirun", ("-1", "2", "0"), "OMPI_COMM_WORLD_RANK is '-1'"),
])
def test_launchers_that_say_nonsense(said_by: str, values: tuple[str, ...], said: str,
                                     alone: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHERS[said_by], values, strict=True):
        alone.setenv(name, value)
    with pytest.raises(AutoparError, match=said):
        init()


@pytest.mark.parametrize(("values", "said"), [({"RANK": "1"}, "RANK is '1' and WORLD_SIZE is not set"),
                                              ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2' and RANK is not set")])
def test_half_of_what_a_launcher_says(values: dict[str, str], said: str, alone: pytest.MonkeyPatch) -> None:
    for name, value in values.items():
        alone.setenv(name, value)
    with pytest.raises(AutoparError, match=said):
        init()


def test_a_host_without_a_port(alone: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        alone.setattr("autopar.launch._DEFAULT_PORT", free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        alone.setenv(name, value)
    init()
    assert dist.get_world_size() == 1


@pytest.mark.parametrize("port", ["", "http", "0", "99999"])
def test_ports_that_are_none(port: str, alone: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": port}.items():
        alone.setenv(name, value)
    with pytest.raises(AutoparError, match=r"MASTER_PORT is .*, needed is a whole number from 1 to 65535"):
        init()


def test_a_port_that_is_taken(alone: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AutoparError, match=f"rank 0 of 2 can't meet the others at 127.0.0.1:{port}: ") as refusal:
            init(0, 2, "127.0.0.1", port)
    assert "\n" not in str(refusal.value) and "the port is free" in str(refusal.value)


def test_without_a_launcher_a_group_of_one(alone: pytest.MonkeyPatch) -> None:
    init()
    init(3, 2)  # a second call does nothing
    assert dist.get_world_size() == 1 and dist.get_backend() == "gloo"


def test_a_gpu_without_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "GeForce 256")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: type("P", (), {"total_memory": 32e6}))
    with pytest.raises(AutoparError, match="no preset describes 'GeForce 256'; pass cluster="):
        local_cluster(2)


@pytest.mark.dist
def test_a_script_with_a_mistake_ends_with_one_clear_line() -> None:
    code = "import autopar; autopar.init(rank=2, world_size=2)"
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment,
                          cwd=Path(autopar.__file__).parents[1])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("autopar.core.errors.AutoparError: rank is 2")


def chatty(rank: int, world_size: int) -> list[str]:
    """What is logged on a rank."""
    autopar.init()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("autopar")
    log.addHandler(handler)
    log.warning("for all")
    log.error("from rank %d", rank)
    log.removeHandler(handler)
    return said


@pytest.mark.dist
def test_what_concerns_all_is_said_once(pool: Any) -> None:
    assert pool(2).run(chatty) == [["for all", "from rank 0"], ["from rank 1"]]


@pytest.mark.parametrize(("cluster", "kind", "said"), [
    ("4xH200", "H200", ""), ("cpu:4", "cpu", ""), ("8xA100-80GB", "cpu", ""),
    ("4xH200", "H100", "cluster 4xH200 has devices of type H200, this rank runs on H100"),
    ("cpu:4", "NVIDIA L4", "cluster cpu:4 has devices of type cpu, this rank runs on NVIDIA L4"),
])
def test_a_cluster_of_other_devices(cluster: str, kind: str, said: str) -> None:
    found = strangeness(Cluster.preset(cluster), kind)
    assert found.startswith(said) and bool(found) is bool(said)
