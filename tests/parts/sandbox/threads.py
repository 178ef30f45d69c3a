"""A child that may have threads, and tries for more. Runs inside a confined child."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading


def run(_features: frozenset[str]) -> str:
    outcomes = {"thread": "did not run"}
    thread = threading.Thread(target=outcomes.update, args=({"thread": "ran"},))
    thread.start()
    thread.join()
    try:
        if os.fork() == 0:
            os._exit(0)
    except OSError as error:
        outcomes["fork"] = type(error).__name__
    # As vfork does it: the memory is shared, and the process is another.
    libc = ctypes.CDLL(None, use_errno=True)
    number = 56 if os.uname().machine == "x86_64" else 220
    pid = libc.syscall(number, 0x4000 | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    outcomes["vfork"] = type(OSError(ctypes.get_errno(), "")).__name__ if pid < 0 else "done"
    return json.dumps(outcomes)
