"""A child that sends what is in the file `lie`, past every check; with a file `linger` it does not end."""

from __future__ import annotations

import os
import time

from mvmci.sandbox.zygote import SOCKET_FD


def run(_features: frozenset[str]) -> str:
    with open("lie", "rb") as file:
        os.write(SOCKET_FD, file.read())
    while os.path.exists("linger"):
        time.sleep(60)
    os._exit(0)
