"""Starts `supervise` in a process of its own, as the fork server does, and finds what it left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from mvmci.sandbox import frames

UID = 62_000 + os.getpid() % 1_000  # no other process of tests shares it: the clean-up ends all that it has
CHILD = """
import os, sys, msgspec
from mvmci.sandbox import frames, program
task = msgspec.json.decode(sys.argv[1], type=frames.RunProgram)
uid = int(sys.argv[2]) or None
streams = tuple(os.dup(n) for n in range(3))
user = int(sys.argv[5])
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
ended = program.supervise_program(task, streams, uid, namespaces=sys.argv[3] == "True")
os.write(int(sys.argv[4]), msgspec.json.encode(ended))
"""


class Supervised:
    """A program under a supervisor; `process` is the supervisor."""

    def __init__(
        self,
        directory: Path,
        *argv: str,
        uid: int | None = None,
        user: int | None = None,
        namespaces: bool = True,
        processes_max: int = 32,
        file_bytes: int = 1 << 30,
        env: tuple[tuple[str, str], ...] = (),
    ) -> None:
        task = frames.RunProgram(
            argv=argv, env=env, directory=str(directory), processes_max=processes_max, file_bytes=file_bytes
        )
        self._answer, write = os.pipe()
        how = [str(uid or 0), str(namespaces), str(write), str(user or 0)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, msgspec.json.encode(task), *how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(write,),
            env={"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/",
        )
        os.close(write)

    def end(self, stdin: bytes = b"", timeout: float = 60) -> tuple[frames.Ended, bytes, bytes]:
        """How it ended, and its two streams."""
        out, err = self.process.communicate(stdin, timeout=timeout)
        return self.answer(err), out, err

    def answer(self, err: bytes = b"") -> frames.Ended:
        """What `supervise` returned."""
        data = os.read(self._answer, 1 << 16)
        os.close(self._answer)
        self._answer = -1
        assert data, err.decode()
        return msgspec.json.decode(data, type=frames.Ended)

    def close(self) -> None:
        """Kill whatever is left."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        if self._answer >= 0:
            os.close(self._answer)


def alive(marker: str) -> list[str]:
    """The command lines of all living processes that hold `marker`, this one's aside."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                line = (
                    Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
            if marker in line and "msgspec" not in line:
                found.append(line)
    return found


def wait_until_dead(marker: str, timeout: float = 30) -> list[str]:
    """Those that are still alive when `timeout` is over."""
    deadline = time.monotonic() + timeout
    while (left := alive(marker)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left
