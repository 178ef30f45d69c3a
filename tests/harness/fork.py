"""Verbs that are forked from a program that has them loaded: `tests/harness/loaded.py`."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.harness.places import ZIPAPP

MODULES = (
    "mvmci.cli.cluster",
    "mvmci.cli.read",
    "mvmci.cli.run",
    "mvmci.cli.submit",
    "mvmci.cli.ticket",
    "mvmci.deploy.operate",
    "mvmci.deploy.up",
    "mvmci.engines.embedded.engine",
    "mvmci.runtimes.compose.runtime",
    "mvmci.runtimes.local.runtime",
    "mvmci.stores.folder",
    "mvmci.stores.nats",
    "mvmci.trust.client",
)


class Forked:
    """What there is of `subprocess.Popen` for a process that another one forked."""

    def __init__(self, answers: socket.socket, stdin: int | None, stdout: int, stderr: int) -> None:
        self.stdin: IO[bytes] | None = None if stdin is None else os.fdopen(stdin, "wb")
        self.stdout: IO[bytes] = os.fdopen(stdout, "rb")
        self.stderr: IO[bytes] = os.fdopen(stderr, "rb")
        self._answers = answers
        self._code: int | None = None
        self.pid = int(answers.recv(32))

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except (BlockingIOError, subprocess.TimeoutExpired):
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._answers.settimeout(timeout)
            try:
                self._code = int(self._answers.recv(32))
            except TimeoutError:
                raise subprocess.TimeoutExpired("a verb", timeout or 0) from None
            self._answers.close()
        return self._code

    def send_signal(self, signum: int) -> None:
        if self._code is None:
            os.kill(self.pid, signum)


class Loaded:
    """A program that waits for verbs to fork."""

    def __init__(self, home: Path) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", Path(__file__).with_name("loaded.py"), ZIPAPP, *MODULES],
                env={"PATH": os.environ["PATH"], "HOME": str(home), "LC_ALL": "C.UTF-8"},
                stdin=theirs,
            )
        self._lock = threading.Lock()

    def fork(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path,
        *,
        stdin: bool = False,
        looks: bool = False,
    ) -> Forked:
        """Begin a verb. `words` start with the zipapp; `stdin`: there is some; `looks`: it only reads."""
        verb = {"words": words, "environment": dict(environment), "cwd": str(cwd), "looks": looks}
        ours, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        in_read, in_write = os.pipe() if stdin else (os.open(os.devnull, os.O_RDONLY), None)
        (out_read, out_write), (err_read, err_write) = os.pipe(), os.pipe()
        theirs = [answers.detach(), in_read, out_write, err_write]
        with self._lock:
            socket.send_fds(self._requests, [json.dumps(verb).encode()], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        return Forked(ours, in_write, out_read, err_read)


@functools.cache
def loaded(home: Path) -> Loaded:
    """The one of this process, for programs with that home. It ends with us."""
    return Loaded(home)
