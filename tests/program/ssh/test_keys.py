"""A host that does not prove who it is: a sentence, exit code 7, and nothing was made on any host."""

from __future__ import annotations

import pytest

from mvmci.runtimes.ssh.known_hosts import host_name
from tests.harness import sshd
from tests.program.ssh.conftest import Farm, Host


def unpin(host: Host) -> None:
    del host.settings["host_key"]


def name_in_file(host: Host) -> str:
    return host_name(sshd.ADDRESS, host.port)


async def refused(farm: Farm, *options: str) -> str:
    """What is said, when nothing is done anywhere."""
    done = await farm.up(*options)
    assert done.code == 7, done
    assert done.err.count("Error: ") == 1
    there = [path.name for host in farm.hosts.values() for path in host.directory.iterdir()]
    assert there == ["_cache", "_cache"]
    assert not (farm.state / "keys").exists()
    assert "Accepted publickey" not in "".join(farm["h2"].sshd.log)
    return done.err


async def test_one_of_which_nothing_is_known(farm: Farm) -> None:
    unpin(farm["h2"])
    said = await refused(farm)
    assert "h2 (" in said
    assert "and nothing is known of it" in said
    assert "--accept-new-host-keys" in said


@pytest.mark.parametrize("accept", [False, True])
async def test_one_that_is_known_by_another_key(farm: Farm, accept: bool) -> None:
    unpin(farm["h2"])
    other = sshd.make_key(farm.folder / "other")
    farm.state.mkdir(0o700, parents=True)
    (farm.state / "known_hosts").write_text(f"{name_in_file(farm['h2'])} {other}\n")
    said = await refused(farm, *(["--accept-new-host-keys"] if accept else []))
    assert f"which is not the one that is known for it ({farm.state}/known_hosts:1)" in said
    assert "somebody may listen in" in said


@pytest.mark.parametrize("accept", [False, True])
async def test_one_that_is_pinned_to_another_key(farm: Farm, accept: bool) -> None:
    farm["h2"].settings["host_key"] = f"'{sshd.make_key(farm.folder / 'other')}'"
    said = await refused(farm, *(["--accept-new-host-keys"] if accept else []))
    assert "and its `host_key:` is another" in said


async def test_one_behind_a_jump_host_that_is_known_by_another_key(farm: Farm) -> None:
    farm["h1"].settings["jump"] = "h2"
    farm["h2"].settings["host_key"] = f"'{sshd.make_key(farm.folder / 'other')}'"
    said = await refused(farm)
    assert "h1 is behind h2, and h2 (" in said
    assert "Accepted publickey" not in "".join(farm["h1"].sshd.log)


async def test_new_keys_are_recorded_if_they_are_to_be_and_a_changed_one_is_refused_then(farm: Farm) -> None:
    for host in farm.hosts.values():
        unpin(host)
    assert (await farm.up("--accept-new-host-keys")).code == 0
    known = farm.state / "known_hosts"
    assert {line.split()[0] for line in known.read_text().splitlines()} == {
        name_in_file(host) for host in farm.hosts.values()
    }
    assert (await farm.up()).code == 0
    farm["h2"].line.swap(farm["h1"].sshd.port)  # there is somebody else now
    for options in ((), ("--accept-new-host-keys",)):
        done = await farm.up(*options)
        assert done.code == 7, done
        assert "h2 (" in done.err
        assert "which is not the one that is known for it" in done.err
    farm["h2"].line.swap(farm["h2"].sshd.port)
