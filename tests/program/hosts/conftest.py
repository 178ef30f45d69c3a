"""A cluster on hosts: its file names those of the harness, with their keys pinned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cluster import Cluster
from tests.harness.hosts import Host, Hosts, hosts
from tests.harness.program import Mvmci
from tests.harness.waiting import until

# What of ours a host may have, by its processes and the names of its files.
OURS = "mvmci"


@dataclass(frozen=True)
class HostsCluster(Cluster):
    """A cluster of `runtime: ssh`, and the hosts that there are."""

    made: Hosts = field(kw_only=True)

    def put(
        self,
        present: list[Host],
        *,
        absent: tuple[Host, ...] = (),
        lost: tuple[Host, ...] = (),
        **sections: Any,
    ) -> None:
        """Write the file: these hosts, and sections as they stand there."""
        named = {host.name: self._section(host) for host in present}
        named |= {host.name: {**self._section(host), "state": "absent"} for host in absent}
        named |= {host.name: {**self._section(host), "state": "lost"} for host in lost}
        # JSON is YAML.
        self.file.write_text(json.dumps({"cluster": self.name, "runtime": "ssh", "hosts": named, **sections}))

    def _section(self, host: Host) -> dict[str, Any]:
        return {
            "address": host.address,
            "user": "root",
            "key": str(self.made.key),
            "host_key": host.host_key,
        }

    def all_well(self, *names: str) -> None:
        """Wait until every unit is ready, and those of `names` are there."""

        def well() -> bool:
            states = self.states()
            return set(states.values()) == {"ready"} and set(names) <= set(states)

        until(well, self.ps)


def ours(host: Host) -> list[str]:
    """What a host has of mvmci: the commands that run there, and its files."""
    commands = [command for command in host.processes().values() if OURS in command]
    return commands + sorted(path for path in host.files() if OURS in path)


@pytest.fixture
def cluster(program: Mvmci, tmp_path: Path) -> Iterator[HostsCluster]:
    """A cluster that is not up, and no hosts yet. What was put up goes down with its hosts."""
    with hosts(tmp_path / "hosts") as made:
        mvmci = dataclasses.replace(program, state=tmp_path / "state")
        yield HostsCluster(mvmci, tmp_path / "topology.yaml", made=made)
