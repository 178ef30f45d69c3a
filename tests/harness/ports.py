"""Ports for those who name one before anybody listens there.

A cluster's file, for example, names the port of a broker that is started seconds later, or a second time.
These lie below those that mvmci chooses from and those that the kernel gives to connections, and each
process that runs tests has some of its own: nobody else is given one meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
from collections.abc import Iterator

from mvmci.errors import Usage
from mvmci.system.ports import PORT_RANGE, check_port

FIRST = 10_000
COUNT = 100  # of a process: many more than it has at once


def own_port(address: str = "127.0.0.1") -> int:
    """A port that nobody listens on. It comes again after all others of this process."""
    _, ports = _own()
    for port in itertools.islice(ports, COUNT):
        with contextlib.suppress(Usage):
            check_port(address, port)
            return port
    raise AssertionError("every port of this process is in use")


@functools.cache
def _own() -> tuple[socket.socket, Iterator[int]]:
    """This process's ports in turn, and the one that it holds, as long as it lives, to have the others."""
    for first in range(FIRST, PORT_RANGE.start, COUNT):
        held = socket.socket()
        try:
            held.bind(("0.0.0.0", first))
        except OSError:
            held.close()
        else:
            return held, itertools.cycle(range(first + 1, first + COUNT))
    raise AssertionError("as many processes run tests as there are ports for")
