"""Verbs that only read, of which tests need thousands: forked from a process that has them loaded.

A program takes half a second of a slow processor, and most of that to import itself, while what it looks
at waits for the processor. Tests of what such a verb prints start the program.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness.waiting import LONG_S

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "mvmci.cli.cluster",
        "mvmci.cli.read",
        "mvmci.deploy.operate",
        "mvmci.runtimes.compose.runtime",
        "mvmci.runtimes.local.runtime",
        "mvmci.stores.folder",
        "mvmci.stores.nats",
        "mvmci.trust.client",
        __name__,
    ]
)


def look(words: Sequence[str], environment: Mapping[str, str]) -> tuple[int, bytes, str]:
    """Run `words`, the zipapp's path and a verb: the exit code, stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _context.Process(target=_run, args=([*words], {**environment}, out, err))
        process.start()
        process.join(LONG_S)
        code = process.exitcode
        assert code is not None, f"{words} never ended"
        process.close()
        return code, out.read_bytes(), err.read_text(errors="replace")


def _run(words: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    from mvmci.cli import main

    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    main()
