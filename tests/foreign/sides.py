"""The two sides of a comparison: a program under the wasmtime library alone, and under `mvmci run`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.harness.program import Mvmci

ALONE = Path(__file__).with_name("alone.py")
RUN_S_MAX = 600

Text = Callable[[bytes], bytes]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program and everything that it is given; `files` are laid out in its workspace before.

    `leaves` is false for one that writes nothing there: reading what is left takes a process more.
    """

    module: Path
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    stdin: bytes | None = None
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    leaves: bool = True


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that can be seen of a program: how it ended, what it wrote, what it left in its workspace."""

    ended: str  # "exit: N" or "trap: TEXT"
    stdout: bytes
    stderr: bytes
    files: Mapping[str, bytes]

    def normalised(self, text: Text) -> Outcome:
        """With what may differ between any two runs taken out of everything, by `text`."""
        files = {name: text(data) for name, data in self.files.items()}
        return replace(self, stdout=text(self.stdout), stderr=text(self.stderr), files=files)


@dataclass(frozen=True)
class Sides:
    """Runs cases both ways. `folder` keeps compiled code and the jobs."""

    folder: Path
    mvmci: Mvmci

    def both(self, case: Case, state: str = "state") -> tuple[Outcome, Outcome]:
        """What `case` does alone, and what it does under `mvmci run` with its jobs in `state`."""
        return self.alone(case), self.under_mvmci(case, state)

    def alone(self, case: Case) -> Outcome:
        cache = self.folder / "code"
        cache.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            place = Path(name)
            workspace, tmp = _laid_out(case, place), place / "tmp"
            tmp.mkdir()
            reads, writes = os.pipe()
            with open(reads, "rb") as ended:
                done = subprocess.run(
                    [sys.executable, ALONE, cache, workspace, tmp, case.module, *case.args],
                    stdin=_stdin(case, place),
                    capture_output=True,
                    timeout=RUN_S_MAX,
                    check=False,
                    pass_fds=(writes,),
                    env={**os.environ, "GUEST_ENV": json.dumps(case.env), "ENDED_FD": str(writes)},
                )
                os.close(writes)
                how = _first_cause(ended.read().decode())
            assert done.returncode == 0, done.stderr.decode()
            left = _files(workspace) if case.leaves else {}
            return Outcome(ended=how, stdout=done.stdout, stderr=done.stderr, files=left)

    def under_mvmci(self, case: Case, state: str = "state") -> Outcome:
        job = f"foreign-{os.urandom(8).hex()}"
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            place = Path(name)
            workspace = _laid_out(case, place)
            options = ["--id", job, "--dir", workspace, "--artifact", "**"]
            for name, value in case.env:
                options += ["--env", f"{name}={value}"]
            if case.stdin is not None:
                _stdin(case, place)
                options += ["--stdin", place / "stdin"]
            done = self._mvmci("run", *options, case.module, "--", *case.args, state=state)
            left = place / "left"
            if case.leaves:
                self._mvmci("artifacts", job, "--local", "--output", left, state=state, check=True)
            ended, stderr = _taken_apart(done, job)
            return Outcome(ended=ended, stdout=done.stdout, stderr=stderr, files=_files(left))

    def _mvmci(
        self, verb: str, *args: str | Path, state: str, check: bool = False
    ) -> subprocess.CompletedProcess[bytes]:
        environment = self.mvmci.environment(MVMCI_STATE=str(self.folder / state))
        command = [self.mvmci.python, self.mvmci.zipapp, verb, *args]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=RUN_S_MAX, env=environment
        )
        assert not check or done.returncode == 0, done.stderr.decode()
        return done


def _laid_out(case: Case, place: Path) -> Path:
    workspace = place / "workspace"
    workspace.mkdir()
    for name, content in case.files.items():
        target = workspace / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            (shutil.copytree if content.is_dir() else shutil.copy)(content, target)
        else:
            target.write_bytes(content)
    for name, to in case.links.items():
        (workspace / name).symlink_to(to)
    return workspace


def _stdin(case: Case, place: Path) -> int:
    """An open file with the case's standard input, which is also at `place`/stdin."""
    if case.stdin is None:
        return subprocess.DEVNULL
    path = place / "stdin"
    path.write_bytes(case.stdin)
    return os.open(path, os.O_RDONLY)


def _files(folder: Path) -> dict[str, bytes]:
    """Regular files by their names; links are not followed."""
    if not folder.exists():
        return {}
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _taken_apart(done: subprocess.CompletedProcess[bytes], job: str) -> tuple[str, bytes]:
    """How the job ended, and its stderr without what `run` says itself: first and last lines."""
    own = rf"\A{job}\n(?:compiling [^\n]*: once on this machine\n)?"
    stderr, count = re.subn(own.encode(), b"", done.stderr)
    assert count == 1, done.stderr.decode()
    if done.returncode == 0:
        return "exit: 0", stderr
    stderr, mark, reason = stderr.rpartition(f"{job} failed: ".encode())
    assert mark, done.stderr.decode()
    return _first_cause(reason.decode().strip()), stderr


def _first_cause(ended: str) -> str:
    """`exit: N`, or `trap: ` and what the trap was, without the places in the code."""
    if not ended.startswith("trap: "):
        return ended
    found = re.search(r"wasm trap: ([^\n]*)", ended)
    return f"trap: {found[1].strip()}" if found else ended
