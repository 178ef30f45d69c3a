"""A cluster under systemd, on hosts with a real one: its supervisor is a service, of the system or of a user.

It is brought up on the host itself, and its units are then handed to the service, by the verb that whoever is
on another machine asks.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from mvmci.runtimes.local.service import FOR_SUPERVISOR
from tests.harness.guests import command
from tests.harness.hosts import Host, hosts
from tests.harness.places import ZIPAPP, need
from tests.harness.waiting import until

pytestmark = pytest.mark.soak

NAME, SERVICE = "c", "mvmci-c.service"
TOPOLOGY = f"cluster: {NAME}\nworkers: {{slots: 1}}\n"
ONE, TWO = "/opt/one.pyz", "/opt/two.pyz"
UNITS = {"broker-1", "control-plane-1", "worker-1"}
USERS: dict[str, Literal["system", "user"]] = {"root": "system", "ci": "user"}


class Site:
    """One cluster on one host, of one of its users."""

    def __init__(self, host: Host, user: str) -> None:
        self.host = host
        self.user = user
        self.kind = USERS[user]
        self.home = "/root" if user == "root" else f"/home/{user}"
        # What it is called is nobody's business: neither a shell nor systemd is to find something in it.
        self.state = "/var/lib/mvmci" if user == "root" else f"{self.home}/my state, 5%n $HOME"
        self.quoted = shlex.quote(self.state)

    def sh(self, line: str) -> str:
        """What a line of shell says, as the user has it who comes by ssh."""
        done = self.host.ssh("sh", "-c", line, user=self.user)
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    def mvmci(self, *words: str, program: str = ONE) -> str:
        return self.sh(shlex.join(self.by_env(program, *words)))

    def by_env(self, program: str, *words: str) -> list[str]:
        return ["env", f"MVMCI_STATE={self.state}", "python3", "-I", program, *words]

    def ask(self, what: dict[str, Any], program: str = ONE, service: str = "none") -> dict[str, Any]:
        """The answer of `mvmci host` there to one request."""
        verb = self.by_env(program, "host", "--cluster", NAME, "--service", service)
        with subprocess.Popen(
            self.host.by_ssh(*verb, user=self.user), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps({"id": 1, "ask": what}).encode() + b"\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            process.stdin.close()  # that is how it ends
        assert answer["last"] and process.returncode == 0
        return answer

    def units(self) -> dict[str, Any]:
        """How the units are, by name."""
        return {one["name"]: one for one in self.ask({"type": "observe"})["value"]["units"]}

    def start(self, units: list[Any], *, service: str, program: str = ONE) -> dict[str, Any]:
        """Have `program` see that these run; its answer."""
        return self.ask({"type": "begin", "start": {"type": "start", "units": units}}, program, service)

    def begin(self, *, service: str) -> None:
        """Bring the cluster up, and have the supervisor be started by what `service` says."""
        self.host.write(f"{self.home}/c.yaml", TOPOLOGY, user=self.user)
        self.mvmci("up", f"{self.home}/c.yaml", "--detach", "--yes")
        units = [one["config"] for one in self.units().values()]
        self.ask({"type": "stop"})
        self.start(units, service=service)

    def systemctl(self, *words: str) -> str:
        own = "" if self.user == "root" else "XDG_RUNTIME_DIR=/run/user/$(id -u) "
        return self.sh(f"{own}systemctl {'' if self.user == 'root' else '--user '}{shlex.join(words)}")

    def shows(self, key: str) -> str:
        return self.systemctl("show", "--value", "-p", key, SERVICE).strip()

    def pids(self) -> dict[str, int]:
        """The units' processes, those that there are."""
        return {name: one["pid"] for name, one in self.units().items() if one.get("pid")}

    def is_ready(self) -> bool:
        """Whether all units run and are seen by each other."""
        done = self.host.ssh(
            *("env", f"MVMCI_STATE={self.state}", "python3", "-I", ONE, "ps", "--json"), user=self.user
        )
        rows = json.loads(done.stdout)["units"] if done.returncode == 0 else []
        return {row["name"] for row in rows if row["state"] == "ready"} >= UNITS

    def runs_a_job(self) -> None:
        until(self.is_ready)
        self.mvmci("submit", "/opt/nothing.wasm", "--wait")

    def kill_supervisor(self, signum: int) -> None:
        self.sh(f"kill -{signum} {self.shows('MainPID')}")


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    need(ZIPAPP.exists(), "no zipapp: ./just zipapp")
    with hosts(tmp_path_factory.mktemp("hosts")) as found:
        (made,) = found.add("h1", systemd=request.param)
        opt = made._root / "opt"
        shutil.copy(ZIPAPP, opt / "one.pyz")
        shutil.copy(ZIPAPP, opt / "two.pyz")
        with zipfile.ZipFile(opt / "two.pyz", "a") as archive:
            archive.comment = b"another build"
        (opt / "nothing.wasm").write_bytes(command(""))
        yield made


@pytest.fixture(params=USERS)
def site(request: pytest.FixtureRequest, host: Host) -> Iterator[Site]:
    site = Site(host, request.param)
    site.begin(service=site.kind)
    yield site
    site.mvmci("down", "--purge")


with_systemd = pytest.mark.parametrize("host", [True], indirect=True, ids=["systemd"])
without = pytest.mark.parametrize("host", [False], indirect=True, ids=["bare"])


@with_systemd
def test_the_supervisor_is_a_service_and_jobs_are_as_isolated_as_without(site: Site) -> None:
    supervisor = json.loads(site.sh(f"cat {site.quoted}/{NAME}/supervisor.json"))["pid"]
    assert site.shows("MainPID") == str(supervisor)
    assert (site.shows("ActiveState"), site.shows("UnitFileState")) == ("active", "enabled")
    for pid in site.pids().values():
        assert site.sh(f"ps -o ppid= -p {pid}").strip() == str(supervisor)
        told = site.sh(f"tr '\\0' '\\n' </proc/{pid}/environ")
        assert not [key for key in FOR_SUPERVISOR if f"{key}=" in told]
    site.runs_a_job()
    rows = json.loads(site.mvmci("ps", "--json"))["units"]
    (level,) = [row["isolation"] for row in rows if row["role"] == "worker"]
    assert level == ("isolated" if site.user == "root" else "confined")
    assert "NOT" not in site.mvmci("doctor")
    # It is well formed, and its log is in one place.
    file = site.shows("FragmentPath")
    assert site.sh(f"systemd-analyze verify {'' if site.user == 'root' else '--user '}{file} 2>&1") == ""
    assert "is started: process" in site.mvmci("logs", "--unit", "supervisor")
    journal = site.host.run("journalctl", "--no-pager")
    assert SERVICE in journal or "mvmci: the units of cluster" in journal
    assert "is started: process" not in journal


@with_systemd
def test_a_supervisor_that_crashed_or_hangs_is_started_again_with_all_its_units(site: Site) -> None:
    for signum in (signal.SIGKILL, signal.SIGSTOP):
        until(site.is_ready)
        before, main = site.pids(), site.shows("MainPID")
        site.kill_supervisor(signum)
        until(lambda before=before: not set(before.values()) & set(site.pids().values()))
        until(site.is_ready)
        assert site.shows("MainPID") not in ("0", main)
        assert site.pids().keys() == before.keys()
    site.runs_a_job()


@with_systemd
def test_a_host_that_reboots_or_loses_its_power_is_back_by_itself(site: Site) -> None:
    site.runs_a_job()
    for again in (Host.reboot, lambda host: (host.power_cut(), host.boot())):
        again(site.host)
        site.runs_a_job()
    assert len(json.loads(site.mvmci("list", "--json"))) == 3


@with_systemd
def test_an_upgrade_keeps_the_units_and_the_next_boot_takes_the_new_program(site: Site) -> None:
    until(site.is_ready)
    before, main = site.pids(), site.shows("MainPID")
    site.start([], service=site.kind, program=TWO)
    assert (site.pids(), site.shows("MainPID")) == (before, main)
    assert TWO in site.sh(f"tr '\\0' ' ' </proc/{main}/cmdline")
    assert TWO in site.shows("ExecStart")
    until(site.is_ready)
    site.host.reboot()
    until(site.is_ready)
    assert TWO in site.sh(f"tr '\\0' ' ' </proc/{site.shows('MainPID')}/cmdline")
    for name in UNITS - {"broker-1"}:  # which is nats-server
        assert ONE in site.sh(f"tr '\\0' ' ' </proc/{site.pids()[name]}/cmdline")


@with_systemd
def test_what_was_stopped_leaves_nothing_with_systemd_and_what_shuts_down_does(site: Site) -> None:
    site.systemctl("stop", SERVICE)
    assert site.pids() == {}
    assert site.shows("Result") == "success"
    site.systemctl("start", SERVICE)
    until(site.is_ready)
    file = site.shows("FragmentPath")
    site.mvmci("down")
    assert site.shows("LoadState") == "not-found"
    left = [path for path in site.host.files() if "mvmci-c" in path]
    assert left == [], file
    assert "mvmci" not in site.systemctl("list-units", "--all", "--no-legend")


@with_systemd
def test_a_supervisor_that_cannot_start_says_why(site: Site) -> None:
    site.ask({"type": "stop"})
    site.sh(f"mv {site.quoted}/{NAME}/supervisor.lock {site.quoted}/{NAME}/moved")
    site.sh(f"mkdir {site.quoted}/{NAME}/supervisor.lock")
    units = [{"unit": {"name": "w", "role": "worker", "host": "h"}}]
    error = site.start(units, service=site.kind)["error"]
    said = f"{error['message']}\nhint: {error['hint']}"
    assert f"`systemctl {'' if site.user == 'root' else '--user '}--quiet start {SERVICE}` failed" in said
    assert "supervisor.lock" in said
    site.sh(f"rmdir {site.quoted}/{NAME}/supervisor.lock")


@without
def test_where_there_is_no_systemd_a_line_of_cron_brings_units_back(host: Host) -> None:
    site = Site(host, "root")
    site.begin(service="auto")
    site.sh(f"echo '@reboot sh {site.state}/{NAME}/boot.sh' | crontab -")
    site.runs_a_job()
    for again in (Host.reboot, lambda host: (host.power_cut(), host.boot())):
        again(site.host)
        site.runs_a_job()
    # An upgrade later, the same line starts the new program: the one before may be gone.
    site.start([], service="none", program=TWO)
    site.host.reboot()
    site.runs_a_job()
    supervisor = json.loads(site.sh(f"cat {site.quoted}/{NAME}/supervisor.json"))["pid"]
    assert TWO in site.sh(f"tr '\\0' ' ' </proc/{supervisor}/cmdline")
    site.mvmci("down", "--purge")
    site.host.reboot()
    assert site.pids() == {}
