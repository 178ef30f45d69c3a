"""Clusters, started and looked at from outside: the zipapp, a home, and files.

`cluster()` gives one with a state directory of its own; `demo` is one that runs for all tests of a module.
"""

from __future__ import annotations

import dataclasses
import os
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import need
from tests.cli.program import Mvmci, Outcome, until

ROOT = Path(__file__).resolve().parent.parent.parent
SMALLEST = "cluster: demo\nworkers: {count: 3, slots: 2}\n"


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
        done = self.mvmci("up", self.file, "--detach", *options)
        assert done.code == 0, done
        return done

    def down(self, *options: str) -> Outcome:
        done = self.mvmci("down", self.file, *options)
        assert done.code == 0, done
        return done

    def ps(self) -> Any:
        done = self.mvmci("ps", "--json")
        assert done.code == 0, done
        return done.json

    def units(self) -> dict[str, dict[str, Any]]:
        return {unit["name"]: unit for unit in self.ps()["units"]}

    def pids(self) -> dict[str, int | None]:
        return {name: unit["pid"] for name, unit in self.units().items()}

    def states(self) -> dict[str, str]:
        return {name: unit["state"] for name, unit in self.units().items()}

    def jobs(self) -> list[str]:
        done = self.mvmci("list", "--json", "--limit", "0")
        assert done.code == 0, done
        return [job["id"] for job in done.json]

    def all_ready(self) -> None:
        """Wait until every unit is."""
        until(lambda: set(self.states().values()) == {"ready"}, self.states)

    def assert_nothing_is_left(self) -> None:
        """No process, no lock that is held, no file that only a running cluster has."""
        self.mvmci.assert_nothing_runs()
        files = {path.name for path in self.folder.iterdir()}
        assert files & {"plan.json", "units.json", "supervisor.json"} == set()
        hidden = [path for path in self.folder.rglob(".*") if path.is_file() and "broker" not in path.parts]
        assert hidden == []
        assert (self.folder / "lock").read_text() == ""


@pytest.fixture(scope="session")
def zipapp() -> Path:
    path = Path(os.environ.get("MVMCI_ZIPAPP", ROOT / "dist" / "mvmci.pyz")).resolve()
    need(path.exists(), "no zipapp: build it with ./just zipapp")
    return path


@pytest.fixture(scope="session")
def program(zipapp: Path, tmp_path_factory: pytest.TempPathFactory) -> Mvmci:
    """The program, with a home for the whole run, so that it unpacks itself once."""
    home = tmp_path_factory.mktemp("home")
    (home / ".cache").mkdir()
    return Mvmci(zipapp, home / "state", home)


@pytest.fixture(scope="module")
def demo(program: Mvmci, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three workers that runs; a test that changes it puts it back."""
    folder = tmp_path_factory.mktemp("demo")
    found = Cluster(dataclasses.replace(program, state=folder / "state"), folder / "topology.yaml")
    found.write(SMALLEST)
    found.up()
    yield found
    found.down()
    found.assert_nothing_is_left()


@pytest.fixture
def cluster(program: Mvmci, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """A cluster with a state directory of its own, not yet started."""
    made: list[Cluster] = []

    def make(text: str = SMALLEST) -> Cluster:
        state = tmp_path / f"state-{len(made)}"
        found = Cluster(dataclasses.replace(program, state=state), tmp_path / f"topology-{len(made)}.yaml")
        found.write(text)
        made.append(found)
        return found

    yield make
    for one in made:
        if one.folder.exists():
            one.mvmci("down", "--cluster", one.name, "--grace", "1s")
        one.mvmci.assert_nothing_runs()


@pytest.fixture(scope="session")
def guest() -> Callable[[str], Path]:
    """The path of a guest by its name."""

    def find(name: str) -> Path:
        path = ROOT / "dist" / "guests" / f"{name}.wasm"
        need(path.exists(), "no guests: build them with ./just examples")
        return path

    return find
