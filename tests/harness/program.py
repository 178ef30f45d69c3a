"""The zipapp as a program: started, listened to, killed, and what it leaves looked at from outside."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.harness.fork import Forked, loaded
from tests.harness.places import ZIPAPP
from tests.harness.ports import clusters_ports
from tests.harness.waiting import LONG_S, until

STATUS_KEYS = [
    "id",
    "queue",
    "kind",
    "status",
    "reason",
    "attempts",
    "epoch",
    "worker",
    "executor",
    "exit_code",
    "result",
    "response",
    "progress",
    "submitted_at",
    "started_at",
    "ended_at",
    "times",
]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")

_numbers = itertools.count()


def fresh(name: str) -> str:
    """An id that no other test has."""
    return f"{name}-{next(_numbers)}-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class Outcome:
    """How a run of the program ended."""

    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def files_in(folder: Path) -> Iterator[Path]:
    """What lies below `folder`, where units may be writing: without files that have no name of their own yet.
    Those that come may have gone."""
    for where, _, names in os.walk(folder):
        for name in names:
            writer = name.rpartition(".")[2] if name.startswith(".") else ""
            is_written = writer.isdecimal() and Path("/proc", writer).exists()  # as `write_private` does it
            if not is_written and Path(where, name).is_file():
                yield Path(where, name)


def is_connected(pid: int) -> bool:
    """Whether that process has a connection that is established."""
    proc, ours = Path(f"/proc/{pid}"), set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for one in (proc / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                ours.add(os.readlink(one))
        sockets = [line.split() for line in (proc / "net" / "tcp").read_text().splitlines()[1:]]
        return any(one[3] == "01" and f"socket:[{one[9]}]" in ours for one in sockets)
    return False


class Running:
    """A program at work, both streams read as they come."""

    def __init__(self, process: subprocess.Popen[bytes] | Forked) -> None:
        self.process = process
        self._said = {"out": bytearray(), "err": bytearray()}
        self._news = threading.Condition()
        streams = {"out": process.stdout, "err": process.stderr}
        self._readers = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True)
            for name, stream in streams.items()
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, stream: Any) -> None:
        with stream:
            while data := os.read(stream.fileno(), 1 << 16):
                with self._news:
                    self._said[name] += data
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def said(self, stream: str = "out") -> bytes:
        """What came through `stream` so far."""
        with self._news:
            return bytes(self._said[stream])

    def hears(self, text: str, stream: str = "out", *, after: int = 0) -> None:
        """Wait until `text` came through `stream`, behind its first `after` bytes."""
        wanted = text.encode()

        def done() -> bool:
            over = not any(reader.is_alive() for reader in self._readers)
            return over or wanted in self._said[stream][after:]

        with self._news:
            self._news.wait_for(done, LONG_S)
            said = bytes(self._said[stream])
        assert wanted in said[after:], f"{text!r} never came: {self._said}"

    def is_connected(self) -> bool:
        """Whether it has a connection that is established."""
        return is_connected(self.pid)

    def signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def kill(self) -> None:
        """`kill -9`, as a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def end(self, within_s: float = LONG_S) -> Outcome:
        """Wait for the end."""
        code = self.process.wait(within_s)
        for reader in self._readers:
            reader.join(LONG_S)
        return Outcome(code, self.said("out"), self.said("err").decode(errors="replace"))


@dataclass(frozen=True)
class Mvmci:
    """The program with a home, a state directory and nothing else of our environment."""

    zipapp: Path
    state: Path
    home: Path
    prefix: tuple[str, ...] = ()  # a program that starts it, as another user for example
    python: str = sys.executable
    env: dict[str, str] = field(default_factory=dict)
    patience_s: float = LONG_S  # with a verb

    def start(
        self,
        *args: str | Path,
        cwd: Path | None = None,
        stdin: Any = subprocess.DEVNULL,
        new_session: bool = False,
        **env: str,
    ) -> Running:
        """Start a verb. `stdin` is a descriptor; nothing is there if absent."""
        process = subprocess.Popen(
            [*self.prefix, self.python, str(self.zipapp), *map(str, args)],
            env=self.environment(**env),
            cwd=cwd,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=new_session,
        )
        return Running(process)

    def __call__(
        self, *args: str | Path, cwd: Path | None = None, stdin: bytes | None = None, **env: str
    ) -> Outcome:
        """Run a verb to its end, forked from a program that is loaded, at less than the price of one."""
        if env or not self._is_loaded:
            given = subprocess.DEVNULL if stdin is None else subprocess.PIPE
            running = self.start(*args, cwd=cwd, stdin=given, **env)
        else:
            words, given = [str(self.zipapp), *map(str, args)], stdin is not None
            running = Running(
                loaded(self.home).fork(words, self.environment(), cwd or Path.cwd(), stdin=given)
            )
        if stdin is not None:
            assert running.process.stdin is not None
            with contextlib.suppress(BrokenPipeError), running.process.stdin as pipe:
                pipe.write(stdin)
        return running.end(self.patience_s)

    def look(self, *args: str | Path) -> Any:
        """What a verb that only reads says as JSON."""
        if self._is_loaded:
            words = [str(self.zipapp), *map(str, args), "--json"]
            looking = loaded(self.home).fork(words, self.environment(), Path.cwd(), looks=True)
            done = Running(looking).end(self.patience_s)
        else:
            done = self(*args, "--json")
        assert done.code == 0, done
        return done.json

    @property
    def _is_loaded(self) -> bool:
        """Whether verbs of this program may be forked."""
        return not self.prefix and (self.zipapp, self.python) == (ZIPAPP, sys.executable)

    def environment(self, **more: str) -> dict[str, str]:
        ours = {"PATH": os.environ["PATH"], "HOME": str(self.home), "MVMCI_STATE": str(self.state)}
        return {**ours, "MVMCI_PORTS": clusters_ports(), "LC_ALL": "C.UTF-8", **self.env, **more}

    def status(self, job: str) -> Any:
        """What `status --json` says."""
        return self.look("status", job, "--local")

    def jobs(self) -> list[str]:
        """The ids that `list` shows."""
        return [one["id"] for one in self.look("list", "--local", "--limit", "0")]

    def journal(self, job: str) -> Path:
        return self.state / "_local" / "jobs" / job / "journal"

    def blob(self, digest: str) -> Path:
        return self.state / "_local" / "blobs" / digest[7:9] / digest[7:]

    def processes(self) -> list[str]:
        """Everything on this machine that belongs to this state directory, as `pid command`."""
        return list(_processes(str(self.state).encode()))

    def assert_nothing_runs(self) -> None:
        """Whatever ran here is gone, or will be in a moment."""
        until(lambda: not self.processes(), lambda: self.processes())

    def assert_slots_are_clean(self) -> None:
        """No job left anything where guests run, nor a temporary file beside it."""
        host = self.state / "_host"
        for place in (host / "slots").iterdir():
            assert {path.name for path in place.iterdir()} <= {"lock", "tmp", "work"}
            assert [*(place / "tmp").iterdir(), *(place / "work").iterdir()] == []
        assert {path.name for path in host.iterdir()} <= {"code", "code.key", "slots"}
        assert not list((host / "code").glob("new-*"))
        assert not list((self.state / "_local" / "blobs").glob(".*"))


def _processes(mark: bytes) -> Iterator[str]:
    for path in Path("/proc").iterdir():
        if not path.name.isdigit() or int(path.name) == os.getpid():
            continue
        try:
            command = (path / "cmdline").read_bytes()
            belongs = mark in command or mark in (path / "environ").read_bytes()
            belongs = belongs or mark in os.fsencode(os.readlink(path / "cwd"))
        except OSError:
            continue  # gone, or a zombie, which runs no more
        if belongs:
            yield f"{path.name} {command!r}"


def other_build(zipapp: Path, folder: Path) -> Path:
    """The same program, as another file than before: what it unpacks stays the same."""
    path = folder / zipapp.name
    shutil.copyfile(zipapp, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"another build"
    return path


def at(mvmci: Mvmci, job: str, record: str) -> float:
    """When the last record of that kind was written, in s since 1970, however late that was heard of."""
    found = [one["at"] for one in mvmci.look("history", job) if one["record"] == record]
    return datetime.fromisoformat(found[-1]).timestamp()


def assert_sentence(done: Outcome, code: int, *words: str) -> None:
    """It ended with `code`, and said why in one sentence, with a hint at most: no traceback, no output."""
    assert done.code == code, done
    assert done.out == b""
    lines = [line for line in done.err.splitlines() if line]
    errors = [line for line in lines if line.startswith("Error: ")]
    assert len(errors) == 1, done.err
    for line in lines:
        assert line.startswith(("Error: ", "hint: ")), done.err
    assert "a bug in mvmci" not in done.err
    for word in words:
        assert word in done.err, done.err


def steps(*several: dict[str, Any]) -> str:
    """The input of the guest `script`."""
    return json.dumps({"steps": several})
