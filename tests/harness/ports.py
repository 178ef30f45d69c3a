"""Ports for those who name one before anybody listens there.

A cluster's file, for example, names the port of a broker that is started seconds later, or a second time, and
`up` chooses one for a broker whose image is yet to be built. Each process that runs tests has ports of its
own, below those that the kernel gives to connections: nobody else is given one meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
from collections.abc import Iterator

from mvmci.errors import Usage
from mvmci.system.ports import check_port

FIRST, END, COUNT = 10_000, 30_000, 1000  # of a process: many more than it has at once
TESTS = 100  # of these; of the others `up` chooses


def own_port(address: str = "127.0.0.1") -> int:
    """A port that nobody listens on. It comes again after all others of this process."""
    _, ports = _own()
    for port in itertools.islice(ports, TESTS - 1):
        with contextlib.suppress(Usage):
            check_port(address, port)
            return port
    raise AssertionError("every port of this process is in use")


def clusters_ports() -> str:
    """Those of this process that `up` may choose from, as they are told to it."""
    held, _ = _own()
    first = held.getsockname()[1]
    return f"{first + TESTS}-{first + COUNT - 1}"


@functools.cache
def _own() -> tuple[socket.socket, Iterator[int]]:
    """This process's ports in turn, and the one that it holds, as long as it lives, to have the others."""
    for first in range(FIRST, END, COUNT):
        held = socket.socket()
        try:
            held.bind(("0.0.0.0", first))
        except OSError:
            held.close()
        else:
            return held, itertools.cycle(range(first + 1, first + TESTS))
    raise AssertionError("as many processes run tests as there are ports for")
