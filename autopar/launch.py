"""Start the process group from whatever launched this process, and find out what it runs on."""

from __future__ import annotations

import atexit
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError


@dataclass(frozen=True, slots=True)
class Launch:
    """Who this process is among the others."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int


_LAUNCHERS: dict[str, tuple[str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
_DEFAULT_PORT = 29500
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
        return
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend == "nccl" and not torch.cuda.is_available():
        raise AutoparError("backend nccl needs a GPU, torch.cuda finds none on this machine; leave backend= out for "
                           "gloo")
    given = _given(rank, world_size, host, port)
    launch = given or _launched()
    if backend == "gloo":
        atexit.register(time.sleep, _SETTLE_SECONDS)
    if backend == "nccl":
        torch.cuda.set_device((launch.local_rank if launch else 0) % torch.cuda.device_count())
    if launch is None:
        folder = tempfile.mkdtemp(prefix="autopar-")
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        return
    store = f"tcp://{launch.host}:{launch.port}"
    dist.init_process_group(backend, init_method="env://" if given is None and "MASTER_ADDR" in os.environ else store,
                            rank=launch.rank, world_size=launch.world_size)


def _given(rank: int | None, world_size: int | None, host: str | None, port: int | None) -> Launch | None:
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise AutoparError(f"rank {rank} of {world_size}: give both, with 0 <= rank < world_size")
    return Launch(rank, world_size, rank, host or "127.0.0.1", port or _DEFAULT_PORT)


def _launched() -> Launch | None:
    for rank, size, local in _LAUNCHERS.values():
        if rank in os.environ and size in os.environ:
            host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", _DEFAULT_PORT))
            return Launch(int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local, "0")), host, port)
    return None


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
    kind = next((kind for words, kind in _KINDS if all(w in name for w in words)), None)
    if kind is None:
        raise AutoparError(f"no preset describes {name!r}; pass cluster=, one of {[kind for _, kind in _KINDS]} or a "
                           "file")
    if kind == "A100":
        kind = "A100-80GB" if memory > 60e9 else "A100-40GB"
    return Cluster.preset(f"{world_size}x{kind}")


_KINDS: list[tuple[tuple[str, ...], str]] = [(("H200",), "H200"), (("H100",), "H100"), (("A100", "SXM"), "A100"),
                                             (("A100", "PCIe"), "PCIe-A100"), (("A100",), "A100"), (("V100",), "V100"),
                                             (("4090",), "RTX-4090")]


def on_rank_zero(make: Callable[[], str]) -> str:
    """What rank 0's `make` returns, on every rank; its AutoparError is raised on every rank."""
    said: list[tuple[str, str] | None] = [None]
    if dist.get_rank() == 0:
        try:
            said = [("made", make())]
        except AutoparError as error:
            said = [("refused", str(error))]
        except BaseException as error:
            text = f"rank 0 failed with {type(error).__name__}: {error}; see its traceback"
            dist.broadcast_object_list([("refused", text)])
            raise
    dist.broadcast_object_list(said)
    assert said[0] is not None
    kind, text = said[0]
    if kind == "refused":
        raise AutoparError(text)
    return text
