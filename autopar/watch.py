"""Every rank hears within seconds that another one is gone, whatever it is waiting for.

Each rank keeps a connection to rank 0, which the system closes with the process, even one that is killed. Rank 0 tells
all others; where it is gone itself its own connections end. Both ends beat: a rank whose process is there and stopped
is one that is not heard of. Collectives alone don't do: under NCCL those that are left wait for minutes, under gloo
only who talks to the lost rank is told.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.util import Finalize

from autopar.codegen.control import GONE, SILENT_SECONDS, How, exchanged, note_away, on_alarm

log = logging.getLogger("autopar")
GRACE_SECONDS = 10.0
"""How long a rank may still take to end by an error of its own, before it is ended."""
_CONNECT_SECONDS = 20.0
_IDLE_SECONDS = 10
"""How long a connection is silent before the system asks whether the other machine is there."""
_WORD = struct.Struct("!i")
_BYE = -1
_NOBODY = -2
_BEAT = -3
_SILENT = -4
"""Of rank 0; one less of each further rank."""
BEAT_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Place:
    """Which of how many ranks this one is, and where rank 0 is."""

    rank: int
    size: int
    host: str


def watch(place: Place) -> None:
    """Watch the other ranks from now on; collective. Where they can't be reached nobody is watched, and it is said."""
    listener = socket.create_server(("", 0), backlog=place.size) if place.rank == 0 else None
    port = exchanged((listener.getsockname()[1] if listener else 0,))[0][0]
    connections: dict[int, socket.socket] = {}
    with contextlib.suppress(OSError):
        connections = _accepted(listener, place.size - 1) if listener else {0: _connected(place, port)}
    whole = len(connections) == (place.size - 1 if listener else 1)
    if not all(fine for (fine,) in exchanged((int(whole),))):
        log.warning("ranks can't reach rank 0 at %s port %d: one that is lost is noticed by the collectives alone",
                    place.host, port)
        return
    Finalize(None, _part, (list(connections.values()),), exitpriority=0)  # multiprocessing skips what atexit has
    on_alarm(lambda: _tell(connections.values(), place.rank))
    threading.Thread(target=_listen, args=(place, connections), name="autopar-watch", daemon=True).start()


def _accepted(listener: socket.socket, count: int) -> dict[int, socket.socket]:
    """The connections of so many ranks."""
    found = {}
    listener.settimeout(_CONNECT_SECONDS)
    for _ in range(count):
        connection, _ = listener.accept()
        connection.settimeout(_CONNECT_SECONDS)
        found[_heard(connection)] = _kept(connection)
    listener.close()
    return found


def _connected(place: Place, port: int) -> socket.socket:
    connection = socket.create_connection((place.host, port), _CONNECT_SECONDS)
    connection.sendall(_WORD.pack(place.rank))
    return _kept(connection)


def _kept(connection: socket.socket) -> socket.socket:
    """A connection that waits for words as long as it takes, and ends when the other machine is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), _IDLE_SECONDS)
    return connection


def _heard(connection: socket.socket) -> int:
    """The next word, _NOBODY when the other side is gone."""
    try:
        word = connection.recv(_WORD.size, socket.MSG_WAITALL)
    except OSError:
        return _NOBODY
    return int(_WORD.unpack(word)[0]) if len(word) == _WORD.size else _NOBODY


@dataclass(eq=False)
class Pulse:
    """When each rank was heard last, and this one looked; seconds of a clock that stands still for nobody."""

    heard: dict[int, float]
    looked: float = field(default_factory=time.monotonic)

    def silent(self, now: float) -> list[int]:
        """The ranks of which nothing was heard for too long; after this rank was stopped itself they have time anew."""
        if now - self.looked > SILENT_SECONDS / 2:
            self.heard = dict.fromkeys(self.heard, now)
        self.looked = now
        return [rank for rank, last in self.heard.items() if now - last > SILENT_SECONDS]


def _listen(place: Place, connections: dict[int, socket.socket]) -> None:
    """Wait until some rank is lost or silent, tell the others and end this one."""
    waiting, beaten = selectors.DefaultSelector(), time.monotonic()
    pulse = Pulse(dict.fromkeys(connections, beaten))
    for rank, connection in connections.items():
        waiting.register(connection, selectors.EVENT_READ, rank)
    while waiting.get_map():
        for key, _ in waiting.select(BEAT_SECONDS):
            word = _heard(connections[key.data])
            pulse.heard[key.data] = time.monotonic()
            if word == _BYE:
                note_away(key.data, "left")
                waiting.unregister(connections[key.data])
                del pulse.heard[key.data]
            elif word != _BEAT:
                _end(place, connections, *told_away(key.data, word))
        for rank in pulse.silent(time.monotonic()):
            _end(place, connections, rank, "silent")
        if time.monotonic() - beaten > BEAT_SECONDS:
            _tell(connections.values(), _BEAT)
            beaten = time.monotonic()


def told_away(said_by: int, word: int) -> tuple[int, How]:
    """The rank that a word from `said_by` tells of, and how it is away."""
    if word <= _SILENT:
        return _SILENT - word, "silent"
    return said_by if word == _NOBODY else word, "lost"


def _tell(connections: Iterable[socket.socket], word: int) -> None:
    """Send a word to those that are still there."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(_WORD.pack(word))


def _end(place: Place, connections: dict[int, socket.socket], lost: int, how: How) -> None:
    """Tell the others of a rank that is lost or silent, and end this one."""
    note_away(lost, how)
    _tell([connections[rank] for rank in connections.keys() - {lost}], _SILENT - lost if how == "silent" else lost)
    log.error("rank %d of %d %s, see what it said last; rank %d ends too", lost, place.size, GONE[how], place.rank)
    time.sleep(GRACE_SECONDS)
    logging.shutdown()
    os._exit(1)


def _part(connections: list[socket.socket]) -> None:
    """Take leave at exit, unless it is an error that ends this process: then the others must not wait for it."""
    error = sys.exc_info()[1] or getattr(sys, "last_value", None)
    if error is not None and not isinstance(error, SystemExit):
        return
    _tell(connections, _BYE)
