"""Network namespaces joined by virtual links, each pair by its own, so that a link can be as slow as a test wants it.

    with joined(4, {(1, 2): 100e6}) as spaces:      # 100 Mbit/s between ranks 1 and 2
        spaces.run(["python", "script.py"])         # one process a rank, as torchrun would start them
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

PORT = 29517
BURST_BYTES = 65536


class NoNamespaces(Exception):
    """Namespaces can't be made here; the message says why."""


@dataclass(frozen=True, slots=True)
class Spaces:
    """The names of namespaces, one a rank."""

    names: tuple[str, ...]

    def run(self, arguments: Sequence[str], seconds: float) -> list[subprocess.CompletedProcess[str]]:
        """What each rank's process did. Raises TimeoutExpired when one takes longer than `seconds`."""
        started = [subprocess.Popen(["ip", "netns", "exec", name, *arguments], env=os.environ | self._place(rank),
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                   for rank, name in enumerate(self.names)]
        try:
            said = [process.communicate(timeout=seconds) for process in started]
        finally:
            for process in started:
                process.kill()
        return [subprocess.CompletedProcess(list(arguments), process.returncode, out, err)
                for process, (out, err) in zip(started, said, strict=True)]

    def _place(self, rank: int) -> dict[str, str]:
        return {"RANK": str(rank), "WORLD_SIZE": str(len(self.names)), "LOCAL_RANK": "0", "MASTER_ADDR": address(0),
                "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": "home", "OMP_NUM_THREADS": "1"}


def address(rank: int) -> str:
    """The one address of a rank, by whichever link."""
    return f"10.77.0.{rank + 1}"


@contextlib.contextmanager
def joined(ranks: int, limited: Mapping[tuple[int, int], float]) -> Iterator[Spaces]:
    """Namespaces whose links, where `limited`, carry so many bits a second each way. Raises NoNamespaces."""
    if not sys.platform.startswith("linux") or not all(map(shutil.which, ("ip", "tc"))):
        raise NoNamespaces("needs Linux with the commands ip and tc")
    names = tuple(f"autopar-{os.getpid()}-{rank}" for rank in range(ranks))
    try:
        for rank, name in enumerate(names):
            _do(f"ip netns add {name}")
            _do(f"ip -n {name} link set lo up")
            # The address sits on an interface of its own: gloo takes the address of an interface, not of a link.
            _do(f"ip -n {name} link add home type veth peer name away")
            _do(f"ip -n {name} addr add {address(rank)}/32 dev home")
            _do(f"ip -n {name} link set home up")
        for i, j in itertools.combinations(range(ranks), 2):
            _link(names, i, j)
            for here, there in ((i, j), (j, i)):
                if (i, j) in limited:
                    _do(f"tc -n {names[here]} qdisc add dev to{there} root tbf rate {limited[i, j]:.0f}bit "
                        f"burst {BURST_BYTES} latency 200ms")
        yield Spaces(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _link(names: tuple[str, ...], i: int, j: int) -> None:
    _do(f"ip -n {names[i]} link add to{j} type veth peer name to{i} netns {names[j]}")
    for here, there in ((i, j), (j, i)):
        _do(f"ip -n {names[here]} link set to{there} up")
        _do(f"ip -n {names[here]} route add {address(there)}/32 dev to{there} src {address(here)}")


def _do(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise NoNamespaces(f"`{command}` failed: {done.stderr.strip()}")
