"""The program with its verbs loaded, from which tests fork those that they need by the hundred.

    python -I loaded.py ZIPAPP MODULE...   stdin is a socket, of which each message is a verb to run

A started program takes half a second of a slow processor, most of it to load its own modules, while what it
looks at waits for the processor. What is forked here does all the rest: it runs the first code of the zipapp,
in the environment, in the directory and on the streams that it is given, and ends as Python ends. Of a look,
of which tests need the most, there is the verb alone. It imports nothing of the tests, so that it has loaded
what a program would have, and that from the zipapp.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from typing import Any

MESSAGE_BYTES_MAX = 1 << 20


def load(zipapp: str, modules: list[str]) -> None:
    """Load what the first code of the zipapp leads to, and `modules`. Nothing is printed."""
    silent = os.open(os.devnull, os.O_WRONLY)
    said = os.dup(1)
    os.dup2(silent, 1)
    sys.argv = [zipapp, "version"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(zipapp, run_name="__main__")
    sys.stdout.flush()
    os.dup2(said, 1)
    for module in modules:
        importlib.import_module(module)


def serve(requests: socket.socket) -> dict[str, Any]:
    """Fork a process for each message. Returns in that process alone: its verb."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those between
    while True:
        message, files, _, _ = socket.recv_fds(requests, MESSAGE_BYTES_MAX, 4)
        if not message:
            sys.exit()
        if os.fork() == 0:
            requests.close()
            return _between(json.loads(message), *files)
        for file in files:
            os.close(file)


def _between(verb: dict[str, Any], answers: int, *streams: int) -> dict[str, Any]:
    """Fork the verb, and answer with its pid and its end. Returns in the verb alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(answers)
        for descriptor, stream in enumerate(streams):
            os.dup2(stream, descriptor)
            os.close(stream)
        os.chdir(verb["cwd"])
        os.environ.clear()
        os.environ.update(verb["environment"])
        return verb
    for stream in streams:
        os.close(stream)
    os.write(answers, str(pid).encode())
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(answers, str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def look() -> None:
    """Run the verb alone, and end at once."""
    from mvmci.cli import main

    code = 0
    try:
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    requests = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    path = sys.path[:]
    load(sys.argv[1], sys.argv[2:])
    gc.freeze()  # the collector of a child is not to touch, and so copy, all of it
    verb = serve(requests)
    sys.argv = verb["words"]
    if verb["looks"]:
        look()
    sys.path[:] = path
    runpy.run_path(sys.argv[0], run_name="__main__")
