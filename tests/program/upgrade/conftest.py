"""A cluster of the release before, whose units are replaced one by one with those of this build.

The release is built from its commit, once, and kept beneath `build/releases`. How long old and new work
beside each other is `MVMCI_BESIDE_S`: some seconds, and ten minutes where somebody wants to see that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from mvmci.errors import EXIT_UNREACHABLE
from mvmci.runtimes.local.runtime import SupervisorFiles, socket_address
from mvmci.trust.client import open_client
from mvmci.wire import level_of
from tests.contracts.golden.messages import RELEASE
from tests.harness.cluster import Cluster
from tests.harness.places import ROOT, need
from tests.harness.program import Mvmci, Running, fresh, steps
from tests.harness.server import Server, serving
from tests.harness.waiting import until

BESIDE_S = float(os.environ.get("MVMCI_BESIDE_S", "15"))
STOP_S = 60.0


@pytest.fixture(scope="session")
def release_before() -> Path:
    """The zipapp of the release before, built from its commit."""
    path = ROOT / "build" / "releases" / f"{RELEASE}.pyz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if not path.exists():
            _build(path)
    return path


def _build(path: Path) -> None:
    try:
        git = subprocess.run(["git", "archive", RELEASE], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        need(False, f"no history with the release before, {RELEASE[:12]}: clone with all of it")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(git.stdout)) as files:
            files.extractall(folder, filter="data")
        tools = _tools(Path(folder))
        ours = {name: value for name, value in os.environ.items() if not name.startswith("MVMCI_")}
        make = [sys.executable, "packaging/make_zipapp.py"]
        env = {**ours, "PYTHONPATH": str(tools)}
        subprocess.run(make, cwd=folder, env=env, check=True, capture_output=True)
        shutil.copyfile(Path(folder) / "dist" / "mvmci.pyz", path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def _tools(release: Path) -> Path:
    """What builds the release and is not among the tools of this build, as the release pinned it."""
    lock = release / "requirements" / "dev.txt"
    pinned = re.search(r"^shiv==.*?(?=^\S)", lock.read_text(), re.MULTILINE | re.DOTALL)
    assert pinned
    lock.write_text(pinned[0])
    install = ["install", "--quiet", "--no-deps", "--require-hashes", "--target", tools := release / "tools"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, *install, "--requirement", lock], check=True, capture_output=True)
    return tools


@dataclasses.dataclass
class Mixed:
    """A cluster that the `old` program brought up, and which units of it run as which program."""

    cluster: Cluster  # as the new program sees it
    old: Cluster
    server: Server
    script: Path
    runs: dict[str, Running] = dataclasses.field(default_factory=dict)  # what a test started itself

    @property
    def programs(self) -> tuple[Mvmci, Mvmci]:
        return self.old.mvmci, self.cluster.mvmci

    def submit(self, program: Mvmci, *what: dict[str, Any], name: str = "j") -> str:
        """A job whose effects are counted outside: `{"once": n}` is one."""
        job = fresh(name)
        body = [
            {"http": {"method": "POST", "url": f"{self.server.url}/{job}/{step['once']}"}}
            if "once" in step
            else step
            for step in what
        ]
        given = ("submit", self.script, "--id", job, "--input", steps(*body))
        while (done := program(*given)).code == EXIT_UNREACHABLE:  # the broker is being restarted
            pass
        assert done.code == 0, done
        return job

    def ended_once(self, job: str, effects: int) -> None:
        """Wait until the job has succeeded, and see that each of its effects happened once.

        One in whose middle its holder was lost, as a unit is that a busy machine silenced, may have happened,
        and the job was told so.
        """
        going = ("queued", "running", "suspended")
        until(lambda: self.status(job)["status"] not in going, lambda: self.status(job))
        ended, history = self.status(job), self.cluster.mvmci.look("history", job)
        assert ended["status"] == "succeeded", ended
        told = [answer.get("error") for answer in ended["result"] if answer]  # a sleep has none
        assert told == ["interrupted" if lost else None for lost in _losses(history)], history
        counts = [self.server.count(f"/{job}/{n}") for n in range(effects)]
        for count, error in zip(counts, told, strict=True):
            assert count == 1 or (error and count == 0), (counts, history)

    def status(self, job: str) -> Any:
        return self.cluster.mvmci.look("status", job)

    def load(self, seconds: float) -> list[str]:
        """Jobs for so long, given by both programs in turn, each of which ended once."""
        end, jobs = time.monotonic() + seconds, []
        while time.monotonic() < end or len(jobs) < 4:
            program = self.programs[len(jobs) % 2]
            jobs.append(self.submit(program, {"once": 0}, {"sleep": 300}, {"once": 1}))
        for job in jobs:
            self.ended_once(job, 2)
        return jobs

    def swap(self, name: str, program: Mvmci) -> None:
        """Stop a unit, and run it as `program` with what it was given."""
        given = self._options(name)
        if name in self.runs:
            running = self.runs.pop(name)
            running.signal(signal.SIGTERM)
            running.end()
        else:
            self._stop(name)
        config = self.cluster.folder / "units" / name / "config.json"
        self.runs[name] = program.start(given["role"], "--config", config, *given["options"])
        self.is_ready(name)

    def _options(self, name: str) -> Any:
        kept = self.cluster.folder.parent / f"{name}.json"
        if not kept.exists():
            units = json.loads((self.cluster.folder / "units.json").read_text())["units"]
            unit = next(one["config"]["unit"] for one in units if one["name"] == name)
            kept.write_text(json.dumps({"role": unit["role"], "options": unit.get("options", [])}))
        return json.loads(kept.read_text())

    def _stop(self, name: str) -> None:
        """Let the supervisor of the release before stop one of its units."""
        request = {"type": "stop", "names": [name], "grace_s": STOP_S}
        with (
            socket_address(SupervisorFiles(self.cluster.folder).socket) as address,
            socket.socket(socket.AF_UNIX) as asked,
        ):
            asked.settimeout(2 * STOP_S)
            asked.connect(address)
            asked.sendall(json.dumps(request).encode() + b"\n")
            assert asked.makefile("rb").readline()

    def is_ready(self, name: str) -> None:
        """Wait until that unit is at work, as the process that was started."""
        running = self.runs[name]

        async def look() -> bool:
            async with open_client(self.cluster.folder) as cluster:
                members = await cluster.store.presence.members()
                states = {
                    one.about.state for one in members if (one.unit, one.about.pid) == (name, running.pid)
                }
                return states == {"ready"}

        until(lambda: asyncio.run(look()), lambda: running.said("err")[-2000:])

    def level(self) -> int:
        """At which the cluster writes."""

        async def look() -> int:
            async with open_client(self.cluster.folder) as cluster:
                settings = await cluster.config.settings()
                assert settings is not None
                return settings.wire

        return asyncio.run(look())

    def levels_of(self, *jobs: str) -> set[int]:
        """Those at which their journals were written."""

        async def look() -> set[int]:
            async with open_client(self.cluster.folder) as cluster:
                entries = [entry for job in jobs for entry in await cluster.journals.read(job)]
                return {level_of(json.loads(entry.data)["id"]) for entry in entries}

        return asyncio.run(look())

    def close(self) -> None:
        for running in self.runs.values():
            running.signal(signal.SIGTERM)
        for running in self.runs.values():
            running.end()
        if self.cluster.folder.exists():
            self.cluster.mvmci("down", "--cluster", "demo", "--grace", "1s")
        self.cluster.mvmci.assert_nothing_runs()


def _losses(history: list[dict[str, Any]]) -> list[bool]:
    """Of each request of a job, whether its holder was lost in the middle.

    Then somebody else took the job before there was a result, and nobody had let go of it: who is stopped
    does so between two effects.
    """
    kinds = [one["record"] for one in history]
    return [
        next(kind for kind in kinds[number:] if kind in ("result", "released", "lease")) == "lease"
        for number, one in enumerate(history)
        if one["record"] == "intent" and one["kind"] == "http"
    ]


@pytest.fixture
def mixed(
    program: Mvmci, release_before: Path, tmp_path: Path, script: Path
) -> Iterator[Callable[[str], Mixed]]:
    """A cluster with this topology, brought up by the release before."""
    made: list[Mixed] = []

    def make(text: str) -> Mixed:
        new = dataclasses.replace(program, state=tmp_path / "state")
        file = tmp_path / "topology.yaml"
        old = Cluster(dataclasses.replace(new, zipapp=release_before), file)
        old.write(text.format(url=server.url))
        found = Mixed(Cluster(new, file), old, server, script)
        made.append(found)
        old.up()
        return found

    with serving() as server:
        yield make
        for one in made:
            one.close()
