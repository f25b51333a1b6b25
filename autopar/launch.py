"""Start the process group from whatever launched this process, and find out what it runs on."""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError, UnknownName
from autopar.core.told import told
from autopar.gpu import why_no_gpu
from autopar.watch import Place, watch


@dataclass(frozen=True, slots=True)
class Launch:
    """Who this process is among the others."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int


LAUNCHERS: dict[str, tuple[str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
_BACKENDS = ("gloo", "nccl")
_DEFAULT_PORT = 29500
_LAST_PORT, _MOST_RANKS = 2**16 - 1, 2**20
_SETTLE_SECONDS = 0.1
"""How long gloo's threads may take at exit to drop the tensors of the last collectives. They need Python's lock for it,
and one that asks for the lock when the interpreter is ending aborts the process: seen on torch 2.13."""


def init(rank: int | None = None, world_size: int | None = None, host: str | None = None, port: int | None = None,
         backend: str | None = None) -> None:
    """Join the process group: as told, else as torchrun, srun or mpirun tell, else as a group of one.

    `backend` is nccl where there are GPUs, else gloo. Calling it again does nothing. Raises AutoparError for arguments
    that don't make a group, and when nccl is asked for without a GPU.
    """
    if dist.is_initialized():
        logging.getLogger("autopar").addFilter(speaks_once)
        return
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend not in _BACKENDS:
        raise UnknownName("backend", backend, list(_BACKENDS))
    if backend == "nccl" and not torch.cuda.is_available():
        raise AutoparError(f"backend nccl needs a GPU, torch.cuda finds none on this machine: {why_no_gpu()}; or leave "
                           "backend= out for gloo")
    given = _given(rank, world_size, host, port)
    launch = given or _launched()
    if backend == "gloo":
        atexit.register(time.sleep, _SETTLE_SECONDS)
    if backend == "nccl":
        torch.cuda.set_device((launch.local_rank if launch else 0) % torch.cuda.device_count())
    try:
        _join(backend, launch, _store(launch, given))
        if launch is not None and launch.world_size > 1:
            watch(Place(launch.rank, launch.world_size, launch.host))
    except (RuntimeError, ValueError, OSError) as error:
        who = f"rank {launch.rank} of {launch.world_size} can't meet the others at {launch.host}:{launch.port}" if (
            launch) else "can't start a group of one"
        said = next(iter(str(error).splitlines()), "")
        raise AutoparError(f"{who}: {type(error).__name__}: {said}; see that all ranks start with one host and port, "
                           "that the port is free and that no rank is given twice") from error


def speaks_once(record: logging.LogRecord) -> bool:
    """Whether a rank says this: rank 0 says everything, the others errors alone, which are their own."""
    return record.levelno >= logging.ERROR or not dist.is_initialized() or dist.get_rank() == 0


def _join(backend: str, launch: Launch | None, store: str) -> None:
    rank, size = (launch.rank, launch.world_size) if launch else (0, 1)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
    logging.getLogger("autopar").addFilter(speaks_once)


def _store(launch: Launch | None, given: Launch | None) -> str:
    """Where the ranks meet, as torch wants it."""
    if launch is None:
        return f"file://{tempfile.mkdtemp(prefix='autopar-')}/store"
    if given is None and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return "env://"
    return f"tcp://{launch.host}:{launch.port}"


def _given(rank: int | None, world_size: int | None, host: str | None, port: int | None) -> Launch | None:
    """What `init` was told, None for nothing. Raises AutoparError unless it is a place in a group."""
    if rank is None and world_size is None:
        if host is not None or port is not None:
            raise AutoparError(f"host {host} and port {port} are given without rank and world_size; give all of them, "
                               "or none under a launcher")
        return None
    place: object = "127.0.0.1" if host is None else host
    if not (isinstance(place, str) and place):
        raise AutoparError(f"host is {told(host)}, needed is the name or address of rank 0's machine")
    figures = {"rank": rank, "world_size": world_size, "port": _DEFAULT_PORT if port is None else port}
    return _launch(figures, rank, place)


def _launched() -> Launch | None:
    """What a launcher says in the environment, None where there is none. Raises AutoparError where it says nonsense."""
    for names in LAUNCHERS.values():
        if all(name in os.environ for name in names[:2]):
            rank, size, local = (_environment(name, 0) for name in names)
            figures = {names[0]: rank, names[1]: size, "MASTER_PORT": _environment("MASTER_PORT", _DEFAULT_PORT)}
            return _launch(figures, local, os.environ.get("MASTER_ADDR", "127.0.0.1"))
    for name, other, harmless in (("RANK", "WORLD_SIZE", "0"), ("WORLD_SIZE", "RANK", "1")):
        if os.environ.get(name, harmless) != harmless:
            raise AutoparError(f"{name} is {os.environ[name]!r} and {other} is not set, needed are both, or none for a "
                               "group of one; start with torchrun")
    return None


def _environment(name: str, otherwise: int) -> object:
    """The variable as a number where it is one."""
    text = os.environ.get(name, str(otherwise))
    return int(text) if text.isascii() and text.isdecimal() else text


def _launch(figures: Mapping[str, object], local_rank: object, host: str) -> Launch:
    """A place in a group of `figures`, by the names they were given: rank, size and port. Raises AutoparError."""
    (rank_name, rank), (size_name, size), (port_name, port) = figures.items()
    count = _whole(size_name, size, 1, _MOST_RANKS)
    place = _whole(rank_name, rank, 0, count - 1)
    return Launch(place, count, _whole("local rank", local_rank, 0, count - 1), host,
                  _whole(port_name, port, 1, _LAST_PORT))


def _whole(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise AutoparError(f"{name} is {told(value)}, needed is a whole number from {least} to {most}; give both rank= and "
                       "world_size=, or start with torchrun, srun or mpirun")


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def local_cluster(world_size: int) -> Cluster:
    """The preset nearest to what this machine has: by the GPU's name, or gloo processes.

    Raises AutoparError for a GPU that no preset describes.
    """
    if not torch.cuda.is_available():
        return Cluster.preset(f"cpu:{world_size}")
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    kind = preset_kind(name, memory)
    if kind is None:
        raise AutoparError(f"no preset describes {name!r}; pass cluster=, one of {[kind for _, kind in _KINDS]} or a "
                           "file")
    return Cluster.preset(f"{world_size}x{kind}")


def preset_kind(name: str, memory_bytes: float) -> str | None:
    """The type, as presets name it, of a GPU that its driver calls `name`; None where none describes it."""
    kind = next((kind for words, kind in _KINDS if all(w in name for w in words)), None)
    if kind == "A100":
        return "A100-80GB" if memory_bytes > 60e9 else "A100-40GB"
    return kind


def kind_of(device: torch.device) -> str:
    """The type of this rank's device: what presets call it, else its driver."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device)
    return preset_kind(name, torch.cuda.get_device_properties(device).total_memory) or name


def strangeness(cluster: Cluster, kind: str) -> str:
    """What to tell of a cluster of other devices than those of `kind` that run, empty where it has such.

    Processes on CPUs may stand for any cluster: there is nothing to tell.
    """
    known = sorted({each.kind for each in cluster.devices})
    if kind == "cpu" or kind in known:
        return ""
    return (f"cluster {cluster.name} has devices of type {', '.join(known)}, this rank runs on {kind}: communication "
            "and memory are priced for another machine; pass autopar.Cluster.measure(), or a file of this one")


_KINDS: list[tuple[tuple[str, ...], str]] = [(("H200",), "H200"), (("H100",), "H100"), (("A100", "SXM"), "A100"),
                                             (("A100", "PCIe"), "PCIe-A100"), (("A100",), "A100"), (("V100",), "V100"),
                                             (("4090",), "RTX-4090")]
