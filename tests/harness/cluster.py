"""A cluster, started and looked at from outside: the zipapp and files."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.program import Mvmci, Outcome
from tests.harness.waiting import until

SMALLEST = "cluster: demo\nworkers: {count: 3, slots: 2}\n"
BUSY = ("--within", "10m")  # for `up` where it is to succeed, however busy the machine is


@dataclass(frozen=True)
class Cluster:
    """A cluster's file and the program that it is given to."""

    mvmci: Mvmci
    file: Path
    name: str = "demo"

    @property
    def folder(self) -> Path:
        return self.mvmci.state / self.name

    def write(self, text: str) -> None:
        self.file.write_text(textwrap.dedent(text))

    def up(self, *options: str) -> Outcome:
        """`up --detach`, which has to succeed."""
        done = self.mvmci("up", self.file, "--detach", *BUSY, *options)
        assert done.code == 0, done
        return done

    def down(self, *options: str) -> Outcome:
        done = self.mvmci("down", self.file, *options)
        assert done.code == 0, done
        return done

    def ps(self) -> Any:
        return self.mvmci.look("ps")

    def units(self) -> dict[str, dict[str, Any]]:
        return {unit["name"]: unit for unit in self.ps()["units"]}

    def pids(self) -> dict[str, int | None]:
        return {name: unit["pid"] for name, unit in self.units().items()}

    def states(self) -> dict[str, str]:
        return {name: unit["state"] for name, unit in self.units().items()}

    def jobs(self) -> list[str]:
        return [job["id"] for job in self.mvmci.look("list", "--all", "--limit", "0")]

    def all_ready(self) -> None:
        """Wait until every unit is."""
        until(lambda: set(self.states().values()) == {"ready"}, self.states)

    def assert_nothing_is_left(self) -> None:
        """No process, no lock that is held, no file that only a running cluster has."""
        self.mvmci.assert_nothing_runs()
        files = {path.name for path in self.folder.iterdir()}
        assert files & {"units.json", "supervisor.json", "supervisor.sock"} == set()
        hidden = [path for path in self.folder.rglob(".*") if path.is_file() and "broker" not in path.parts]
        assert hidden == []
        assert (self.folder / "lock").read_text() == ""
