"""A Docker engine, an image to build on, and the program that is told where they are.

All of this stays on one worker: there is one engine, and one project at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cluster import Cluster
from tests.harness.docker import HERE, Docker
from tests.harness.program import Mvmci

BUILD_S = 900.0  # for a verb that may build an image, on a machine that is busy


@pytest.fixture(scope="session")
def contained(program: Mvmci, docker: Docker) -> Iterator[Mvmci]:
    """The program, which finds the engine."""
    told = {key: value for key, value in docker.environment.items() if key in HERE}
    yield dataclasses.replace(program, env=told, patience_s=BUILD_S)
    if images := docker.kept("mvmci-demo"):
        docker("image", "rm", *images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compose")


@pytest.fixture(scope="module")
def cluster(contained: Mvmci, docker: Docker, folder: Path) -> Iterator[Cluster]:
    """A cluster with a state directory of its own, not yet started; nothing is left of it at the end."""
    made = Cluster(dataclasses.replace(contained, state=folder / "state"), folder / "topology.yaml")
    yield made
    if made.folder.exists():
        docker.keep("mvmci-demo")
        made.mvmci("down", "--cluster", made.name, "--purge")
        assert docker.kept("mvmci-demo"), "what has another name too is not this cluster's alone"
    assert_nothing_is_left(docker)


def assert_nothing_is_left(docker: Docker) -> None:
    """No container, network, volume or image of the project."""
    label = "label=com.docker.compose.project=mvmci-demo"
    assert docker("ps", "-aq", "--filter", label) == ""
    for what in ("network", "volume"):
        assert docker(what, "ls", "-q", "--filter", label) == ""
    assert docker("image", "ls", "-q", "mvmci-demo") == ""


def containers(docker: Docker) -> dict[str, Any]:
    """The containers of the project that run: their ids, by their names without the project's."""
    listed = docker("ps", "--format", "{{.Names}} {{.ID}}", "--filter", "name=mvmci-demo").splitlines()
    names = (line.split() for line in listed)
    return {name.removeprefix("mvmci-demo")[1:].replace("_", "-"): one for name, one in names}


Guest = Callable[[str], Path]
