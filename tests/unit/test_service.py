"""The service that systemd has of a cluster: its text, what is told it, and what stands in for it."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Literal

import pytest

from mvmci.deploy.render import render_systemd
from mvmci.errors import Usage
from mvmci.runtime import GRACE_S
from mvmci.runtimes.local import service
from mvmci.runtimes.local.service import Service, after_boot, boot_script, choose, notify, service_text
from mvmci.runtimes.local.unit_process import USUAL
from mvmci.system.tasks import cancel
from tests.harness.places import need

PROGRAM = ["/usr/bin/python3", "-I", "/var/lib/mvmci/bin/abc.pyz"]
ROOT = Path("/var/lib/mvmci")
Kind = Literal["system", "user"]


def values(text: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


def test_it_starts_the_supervisor_with_what_was_wanted_before() -> None:
    text = service_text(PROGRAM, ROOT, "demo", "system", {"MVMCI_LOG": "DEBUG"})
    assert values(text, "ExecStart") == [f"{shlex.join(PROGRAM)} supervise --resume --cluster demo"]
    assert values(text, "Environment") == ["MVMCI_STATE=/var/lib/mvmci", "MVMCI_LOG=DEBUG"]
    assert values(text, "WantedBy") == ["multi-user.target"]
    assert values(service_text(PROGRAM, ROOT, "demo", "user"), "WantedBy") == ["default.target"]


@pytest.mark.parametrize("kind", ["system", "user"])
def test_it_is_left_the_time_of_a_drain_and_started_again_for_ever(kind: Kind) -> None:
    text = service_text(PROGRAM, ROOT, "demo", kind)
    assert int(values(text, "TimeoutStopSec")[0]) >= 2 * (GRACE_S + USUAL.hurry_s)
    assert values(text, "KillMode") == ["mixed"]  # the supervisor alone is asked to stop, and stops its units
    assert values(text, "StartLimitIntervalSec") == ["0"]
    assert values(text, "SuccessExitStatus") == ["143 130"]


def test_a_user_without_root_is_given_nothing_that_only_root_can_have() -> None:
    text = service_text(PROGRAM, ROOT, "demo", "user")
    for key in ("User", "ProtectSystem", "CapabilityBoundingSet", "SystemCallFilter", "PrivateTmp"):
        assert values(text, key) == []


def test_a_state_in_tmp_is_found_there() -> None:
    assert values(service_text(PROGRAM, ROOT, "demo", "system"), "PrivateTmp") == ["yes"]
    for place in ("/tmp/state", "/var/tmp/a/b"):
        assert values(service_text(PROGRAM, Path(place), "demo", "system"), "PrivateTmp") == []


@pytest.mark.parametrize("kind", ["system", "user"])
@pytest.mark.parametrize("folder", ["plain", 'a b"c', "50%n", "$HOME ${X}", "back\\slash;x"])
def test_systemd_finds_nothing_wrong_with_it_and_reads_the_words_as_they_are(
    tmp_path: Path, kind: Kind, folder: str
) -> None:
    need(shutil.which("systemd-analyze"), "no systemd-analyze: apt-get install systemd")
    root = tmp_path / folder
    (root / "demo").mkdir(parents=True)
    python = tmp_path / "py thon"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    file = tmp_path / "mvmci-demo.service"
    file.write_text(service_text([str(python), "-I", str(root / "a.pyz")], root, "demo", kind))
    own = ["--user"] if kind == "user" else []
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        ["systemd-analyze", *own, "verify", "--man=no", file],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    about = [line for line in done.stderr.splitlines() if "mvmci-demo" in line]
    assert (done.returncode, about) == (0, [])


def test_the_service_that_is_shown_of_a_host_is_that_of_who_logs_in_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    file = tmp_path / "demo.yaml"
    hosts = "{h1: {}, h2: {user: root}, h3: {user: root, service: user}, h4: {service: none}}"
    file.write_text(f"cluster: demo\nruntime: ssh\nworkers: {{}}\nhosts: {hosts}\n")
    found = {host: str(path.parent) for host, (path, _) in render_systemd(file, tmp_path).items()}
    of_user = ".config/systemd/user"
    assert found == {"h1": f"/home/alice/{of_user}", "h2": "/etc/systemd/system", "h3": f"/root/{of_user}"}


def test_a_word_with_a_line_break_is_refused() -> None:
    with pytest.raises(Usage, match="cannot stand in a service of systemd"):
        service_text(PROGRAM, Path("/var/a\nExecStartPre=/bin/false"), "demo", "system")


def test_a_service_of_another_state_directory_is_neither_replaced_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "SYSTEM_UNITS", tmp_path)
    ours = Service("system", tmp_path / "ours", "demo")
    text = service_text(PROGRAM, tmp_path / "theirs", "demo", "system")
    ours.file.write_text(text)
    with pytest.raises(Usage, match="its state lies elsewhere"):
        ours.write(PROGRAM, {})
    assert service.services(tmp_path / "ours", "demo") == []
    assert [one.kind for one in service.services(tmp_path / "theirs", "demo")] == ["system"]


def test_what_is_wanted_of_a_host_without_systemd_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "BOOTED", tmp_path / "no")
    assert choose() == choose("none") == "none"
    for wanted in ("system", "user"):
        with pytest.raises(Usage, match="this host was not booted with systemd"):
            choose(wanted)
    monkeypatch.setattr(service, "BOOTED", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(service, "_lingers", lambda: True)
    assert choose() == choose("user") == "user"
    with pytest.raises(Usage, match="only root can have one"):
        choose("system")
    monkeypatch.setattr(service, "_lingers", lambda: False)
    assert choose() == "none"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert choose() == "system"


def test_what_starts_after_a_boot_without_systemd_is_what_the_service_starts(tmp_path: Path) -> None:
    """The same program for the same state in the same environment: a cache elsewhere would stay for ever."""
    told = tmp_path / "told"
    program = tmp_path / "my program"
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$MVMCI_STATE" "$SHIV_ROOT" "$@" >{shlex.quote(str(told))}\n'
    )
    program.chmod(0o755)
    root = tmp_path / "my state, 100%"
    (root / "demo").mkdir(parents=True)
    script = root / "demo" / "boot.sh"
    script.write_text(boot_script([str(program), "-I"], root, "demo", {"SHIV_ROOT": "/srv/my cache"}))
    subprocess.run(["sh", script], check=True)
    said = ["-I", "supervise", "--resume", "--cluster", "demo"]
    assert told.read_text().splitlines() == [str(root), "/srv/my cache", *said]
    assert (root / "demo" / "supervisor.log").read_text() == ""


def test_the_line_that_starts_units_after_a_boot_is_one_for_cron(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path("/srv/my state/100%/demo/boot.sh")
    assert after_boot("system", script) == ""
    monkeypatch.setattr(service, "LINGERING", ROOT)
    assert "loginctl enable-linger" in after_boot("user", script)
    monkeypatch.setattr(service, "BOOTED", ROOT / "no")
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/crontab")
    assert r"in `crontab -e` does: @reboot sh '/srv/my state/100\%/demo/boot.sh'" in after_boot(
        "none", script
    )
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "put this under the host's init: sh '/srv/my state/100%/demo" in after_boot("none", script)
    monkeypatch.setattr(service, "BOOTED", Path("/"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "has this user's systemd do it" in after_boot("none", script)


class Killed(Exception):
    """Stands for a SIGKILL."""


def test_a_service_is_enabled_also_where_somebody_was_killed_who_had_written_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "SYSTEM_UNITS", tmp_path)
    asked: list[str] = []

    def systemctl(_: Service, verb: str, *words: str, check: bool = True) -> None:
        asked.append(verb)
        if len(asked) == 1:
            raise Killed

    monkeypatch.setattr(Service, "_systemctl", systemctl)
    ours = Service("system", ROOT, "demo")
    with pytest.raises(Killed):
        ours.write(PROGRAM, {})
    assert ours.file.exists()
    ours.write(PROGRAM, {})
    assert "enable" in asked[1:]


@pytest.mark.parametrize("abstract", [False, True])
async def test_systemd_is_told_as_long_as_the_loop_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    address = f"\0{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        notify("READY=1")
        assert told.recv(100) == b"READY=1"
        monkeypatch.setenv("WATCHDOG_USEC", "30000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        telling = asyncio.create_task(service.notify_always())
        for _ in range(3):
            assert await asyncio.to_thread(told.recv, 100) == b"WATCHDOG=1"
        await cancel(telling)
    notify("READY=1")  # nobody hears it any more
    monkeypatch.setenv("WATCHDOG_PID", "1")  # it was another process that was to tell
    await asyncio.wait_for(service.notify_always(), 60)
