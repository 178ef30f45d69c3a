"""A disk that was full once, from outside: it is said while it is, and jobs go on by themselves after it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster
from tests.harness.places import need
from tests.harness.program import Mvmci
from tests.harness.waiting import until

Guest = Callable[[str], Path]
SIZE = "60m"


@pytest.fixture
def small(program: Mvmci, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster whose state directory is a disk of `SIZE`."""
    need(os.geteuid() == 0, "only root can mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", disk]
    need(
        subprocess.run(mount, check=False, capture_output=True).returncode == 0, "nothing may be mounted here"
    )
    found = Cluster(dataclasses.replace(program, state=disk), tmp_path / "one.yaml")
    found.write("cluster: demo\nworkers: {count: 1, slots: 1}\n")
    try:
        yield found
    finally:
        found.mvmci("down", "--grace", "1s")
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_was_full_is_said_and_jobs_go_on_by_themselves(small: Cluster, guest: Guest) -> None:
    warned = small.up()
    assert "broker.store is 10.0 GiB, and" in warned.err
    hello = guest("hello")
    assert small.mvmci("submit", hello, "--wait").code == 0
    fill = small.mvmci.state / "fill"
    with suppress(OSError), open(fill, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    while small.mvmci("submit", hello).code == 0:
        pass  # there may be room for some in what is allocated already
    until(lambda: "no space left on device" in small.ps()["trouble"], small.ps)
    assert small.states()["broker-1"] == "down"
    refused = small.mvmci("submit", hello)
    assert refused.code == 6, refused
    assert "no space left on device" in refused.err
    fill.unlink()
    until(lambda: small.states()["broker-1"] == "ready" and small.ps()["trouble"] == "", small.ps)
    assert small.mvmci("submit", hello, "--id", "after", "--wait").code == 0
    assert small.ps()["loss"] == []
