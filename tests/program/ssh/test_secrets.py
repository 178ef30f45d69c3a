"""Where secrets are: each where it belongs, for its owner alone, and nowhere else."""

from __future__ import annotations

import re
import stat
from contextlib import suppress
from pathlib import Path

from tests.harness.program import files_in
from tests.program.ssh.conftest import Farm

SEED = re.compile(rb"S[AOU][A-Z2-7]{56}")
PRIVATE = re.compile(  # of a key on a curve, behind what all of them begin with
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:\\n|\s)+[A-Za-z0-9+/]{48}([A-Za-z0-9+/]{16})"
)


def secrets_in(folder: Path) -> dict[bytes, set[Path]]:
    """The secret keys that lie in a folder, each with the files that it is in."""
    found: dict[bytes, set[Path]] = {}
    for path in files_in(folder):
        if "_cache" not in path.parts and path.suffix != ".pyz":
            with suppress(FileNotFoundError):  # a unit has removed it
                data = path.read_bytes()
                for secret in (*SEED.findall(data), *PRIVATE.findall(data)):
                    found.setdefault(secret, set()).add(path)
    return found


def told_to_everybody() -> bytes:
    """Arguments and environments of all processes of this machine."""
    said = b""
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            with suppress(OSError):
                said += (process / name).read_bytes() + b"\n"
    return said


async def test_every_secret_is_where_it_belongs_and_nowhere_else(farm: Farm) -> None:
    farm.workers = "count: 3, slots: 1"
    assert (await farm.up()).code == 0
    here = secrets_in(farm.mvmci.state)
    there = {name: secrets_in(host.directory) for name, host in farm.hosts.items()}
    login = (farm.folder / "key").read_bytes().splitlines()[3]

    # A unit's key was made on its host, lies in its own file, and never left it.
    assert len(there["h1"]) >= 4
    assert len(there["h2"]) == 1
    assert not there["h1"].keys() & there["h2"].keys()
    for found in there.values():
        assert not found.keys() & here.keys()
        for secret, files in found.items():
            owners = {file.parent.name for file in files}
            assert len(owners - {"broker"}) == 1, (files, secret[:2])
            assert {file.parent.parent.name for file in files} <= {"units", "demo"}, files
    for host in farm.hosts.values():
        assert stat.S_IMODE(host.folder.stat().st_mode) == 0o700

    # Those of the cluster are with the operator alone; no host can sign for it, or reach another host.
    assert {secret[:2] for secret in here} >= {b"SA", b"SO"}
    for secrets in (here, *there.values()):
        for files in secrets.values():
            assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files), files
    for host in farm.hosts.values():
        for path in files_in(host.folder):
            with suppress(FileNotFoundError):
                assert login not in path.read_bytes()

    # Nobody was told any of them in a way that others see.
    said = told_to_everybody()
    for secrets in (here, *there.values()):
        assert not [secret[:4] for secret in secrets if secret in said]
    assert login not in said
