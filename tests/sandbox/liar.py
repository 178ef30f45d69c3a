"""A child that sends whatever is in the file `lie`, past every check, and ends."""

from __future__ import annotations

import os

from mvmci.sandbox.zygote import SOCKET_FD


def run(_features: frozenset[str]) -> str:
    with open("lie", "rb") as file:
        os.write(SOCKET_FD, file.read())
    os._exit(0)
