"""The hosts that other tests are made on: what is done to them happens, and nothing is left of them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.harness import network
from tests.harness.hosts import CGROUPS, USERS, Host, Hosts, hosts
from tests.harness.network import NETNS
from tests.harness.places import ROOT
from tests.harness.waiting import until

REACHED, FAILED = 0, 255


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(tmp_path_factory.mktemp("hosts")) as found:
        found.add("h1", systemd=True)
        found.add("b1", "b2", systemd=False)
        yield found


@pytest.fixture(params=["h1", "b1"], ids=["systemd", "bare"])
def host(request: pytest.FixtureRequest, made: Hosts) -> Host:
    """A host of each kind."""
    return made.hosts[request.param]


@pytest.mark.parametrize("user", USERS)
def test_each_user_comes_in_and_finds_a_host(host: Host, user: str) -> None:
    done = host.ssh("sh", "-c", "whoami; hostname; pwd; echo $XDG_RUNTIME_DIR", user=user)
    home = "/root" if user == "root" else f"/home/{user}"
    assert (done.returncode, done.stdout.split()[:3]) == (REACHED, [user, host.name, home]), done
    assert host.ssh("test", "-d", "/run/systemd/system", user=user).returncode == (not host.has_systemd)


def test_an_ordinary_user_has_units_where_there_is_systemd(made: Hosts) -> None:
    host = made.hosts["h1"]
    started = host.ssh("systemd-run", "--user", "--unit=waits", "/bin/sleep", "infinity", user="ci")
    assert started.returncode == 0, started
    until(lambda: "/bin/sleep infinity" in host.processes().values(), host.processes)
    state = host.ssh("systemctl", "--user", "is-active", "waits", user="ci")
    assert state.stdout == "active\n", state
    assert host.ssh("systemctl", "--user", "stop", "waits", user="ci").returncode == 0
    assert host.ssh("systemctl", "is-system-running", "--wait").stdout == "running\n"


def test_a_host_is_away_while_its_cable_is_out(host: Host) -> None:
    host.unplug()
    try:
        assert host.ssh("true").returncode == FAILED
        assert host.run("hostname") == f"{host.name}\n"
    finally:
        host.plug()
    until(lambda: host.ssh("true").returncode == REACHED)


def test_a_power_cut_takes_what_runs_and_leaves_the_disk(host: Host) -> None:
    before = host.host_key
    host.ssh("sh", "-c", "echo kept >kept; echo lost >/run/lost", user="root")
    host.ssh("sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 </dev/null &", user="ci")
    until(lambda: "sleep 1000" in host.processes().values())
    assert {"/root/kept", "/run/lost"} <= host.files().keys()

    host.power_cut()
    assert host.processes() == {}
    assert "/root/kept" in host.files()

    host.boot()
    assert "sleep 1000" not in host.processes().values()
    assert host.ssh("cat", "kept").stdout == "kept\n"
    assert "/run/lost" not in host.files()
    assert host.host_key == before


def test_a_reboot_is_told_to_what_runs(host: Host) -> None:
    # What a login left, logind hangs up on as well.
    script = "trap '' HUP; trap 'echo told >told; exit' TERM; echo >ready; while :; do sleep 0.1; done"
    host.ssh("sh", "-c", f"setsid sh -c {script!r} >/dev/null 2>&1 </dev/null &")
    until(lambda: "/root/ready" in host.files())
    host.reboot()
    told = host.ssh("cat", "told")
    assert told.stdout == "told\n", told


def test_a_line_of_cron_runs_as_a_host_boots(host: Host) -> None:
    added = host.ssh("sh", "-c", "echo '@reboot echo >booted' | crontab -", user="ci")
    assert added.returncode == 0, added
    assert "/home/ci/booted" not in host.files()
    host.reboot()
    until(lambda: "/home/ci/booted" in host.files())


def test_a_host_whose_key_changes_is_another(made: Hosts, host: Host) -> None:
    known = made.known_hosts.read_text()
    host.change_key()
    refused = host.ssh("true")
    assert refused.returncode == FAILED
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in refused.stderr
    made.known_hosts.write_text(f"{host.address} {host.host_key}\n")
    assert host.ssh("true").returncode == REACHED
    made.known_hosts.write_text(f"{known}{host.address} {host.host_key}\n")


def test_a_hidden_host_is_reached_from_another_alone(made: Hosts) -> None:
    hidden, jump = made.hosts["b2"], made.hosts["b1"]
    assert hidden.ssh("true").returncode == REACHED
    made.hide(hidden)
    assert hidden.ssh("true").returncode == FAILED
    assert hidden.host_key in jump.run("ssh-keyscan", "-t", "ed25519", hidden.address)


def left(mark: str) -> list[str]:
    """What this machine has of a network: its namespaces, cgroups, links and mounts."""
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    lines = (Path("/proc/self/mounts").read_text() + links).splitlines()
    places = [*NETNS.glob(f"{mark}*"), *CGROUPS.glob(f"*/{mark}*"), *CGROUPS.glob(f"{mark}*")]
    return [*map(str, places), *(line for line in lines if mark in line)]


def all_gone(pids: list[int]) -> bool:
    return not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number, held = network._take_number()  # nobody else has it before we have looked
    monkeypatch.setattr(network, "_take_number", lambda: (number, held.dup()))

    def fail() -> NoReturn:
        with hosts(tmp_path) as made:
            marks.append(made.network.mark)
            for host in (*made.add("h1", systemd=True), *made.add("b1", systemd=False)):
                host.ssh("sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 </dev/null &")
                pids.extend(host.processes())
            assert left(marks[0])
            raise ZeroDivisionError

    marks: list[str] = []
    pids: list[int] = []
    with held:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert left(marks[0]) == []
    until(lambda: all_gone(pids))
    assert {path.name for path in tmp_path.iterdir()} == {"key", "key.pub", "known_hosts"}


KILLED = """
import os, sys, pathlib, signal
from tests.harness.hosts import hosts
with hosts(pathlib.Path(sys.argv[1])) as made:
    added = [*made.add("h1", systemd=True), *made.add("b1", systemd=False)]
    print(made.network.number, *(pid for host in added for pid in host.processes()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_is_left_of_somebody_killed_goes_with_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, tmp_path / "killed"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == -signal.SIGKILL, said
    number, *pids = map(int, said.stdout.split())

    # Whoever runs beside this may have that number by now, and so have removed them.
    with contextlib.ExitStack() as held:
        while held.enter_context(hosts(tmp_path / "next")).network.number < number:
            pass
        until(lambda: all_gone(pids))
