"""A cluster's supervisor as a service of systemd: of the system, or of a user.

There is one for a cluster and a host, and its units stay the supervisor's children, as they are without one.
systemd starts it at a boot, starts it again when it crashed or hangs, and gives its units the time of a drain
when the machine shuts down; what they are it reads in `desired.json`.

    /etc/systemd/system/mvmci-CLUSTER.service      of root
    ~/.config/systemd/user/mvmci-CLUSTER.service   of anybody else, whose manager runs from a login on, and
                                                   from a boot on if the user *lingers*
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mvmci.errors import MvmciError, Usage
from mvmci.runtime import GRACE_S
from mvmci.runtimes.local.unit_process import USUAL
from mvmci.system.files import private_folder, sync_folder

Kind = Literal["system", "user", "none"]
BOOTED = Path("/run/systemd/system")  # is there where systemd is what was booted
SYSTEM_UNITS = Path("/etc/systemd/system")
USER_UNITS = Path(".config/systemd/user")  # in a home
LINGERING = Path("/var/lib/systemd/linger")
NOTIFY_SOCKET = "NOTIFY_SOCKET"
# What systemd tells the supervisor, and no unit of it.
FOR_SUPERVISOR = (NOTIFY_SOCKET, "WATCHDOG_USEC", "WATCHDOG_PID", "INVOCATION_ID", "JOURNAL_STREAM")
WATCHDOG_S = 30
MANAGER_S = 10.0  # until a user's systemd is there that was asked for
# Workers drain, then executors; then the control plane and the broker end, which have nothing to drain.
STOP_S = round(2 * (GRACE_S + USUAL.hurry_s) + 30)

TEXT = """\
# Written by mvmci. `mvmci down` removes it.

[Unit]
Description=mvmci: the units of cluster {cluster} on this host
{after}# It is never given up: a broker that stays away is worse than one that is tried for ever.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
{environment}
WorkingDirectory=/
# A new program unpacks itself first.
TimeoutStartSec=300
# The journal has what systemd says of it. Its own log is where `mvmci logs` looks, with or without systemd.
StandardOutput=null
StandardError=append:{log}

Restart=on-failure
RestartSec=2
# One that hangs is killed at once, and its units with it: they are its children, and no other may have them.
WatchdogSec={watchdog_s}
WatchdogSignal=SIGKILL
# SIGTERM goes to the supervisor alone, which stops its units in their order; they have time to drain.
KillMode=mixed
TimeoutStopSec={stop_s}
SuccessExitStatus=143 130

# A job that is out of memory is that job's end, and not the end of its neighbours.
OOMPolicy=continue
# Slots bound their own processes and files; what is for everybody would be shared by all of them.
TasksMax=infinity
LimitNOFILE=65536
# Units hold keys.
LimitCORE=0
{hardening}
[Install]
WantedBy={wanted_by}
"""

# The criterion: a job may do here what it may do without systemd. So what is taken away is what no guest and
# no program of a job could do anyway, being another user without privileges; it is taken from the units,
# which are root. What they need stays: users for slots, mounts, namespaces, memory that is written and run.
# Left out, and why: ProtectHome (the program's cache, its Python and the state may lie in a home);
# ProtectSystem=strict, PrivateDevices, ProtectClock and RestrictAddressFamilies (programs of jobs use what
# these hide); RestrictSUIDSGID (so do their archives); MemoryDenyWriteExecute (guests are compiled);
# RestrictNamespaces and Delegate (namespaces are made here, and no cgroups).
HARDENING = """
# No guest and no program of a job gets more rights by what it executes; nor do units.
NoNewPrivileges=yes
# Nothing here writes the system's programs or configuration.
ProtectSystem=full
ProtectControlGroups=yes
ProtectKernelTunables=yes
ProtectKernelLogs=yes
ProtectHostname=yes
RestrictRealtime=yes
{private_tmp}# Units are root for users of slots and for mounts alone: no modules, clock, raw disks, labels.
CapabilityBoundingSet=~CAP_SYS_MODULE CAP_SYS_BOOT CAP_SYS_TIME CAP_SYS_RAWIO CAP_SYS_PACCT CAP_SYSLOG
CapabilityBoundingSet=~CAP_MAC_ADMIN CAP_MAC_OVERRIDE CAP_AUDIT_CONTROL CAP_WAKE_ALARM CAP_LINUX_IMMUTABLE
SystemCallFilter=~@clock @module @raw-io @reboot @swap @cpu-emulation @obsolete
SystemCallErrorNumber=EPERM
"""


BOOT_SCRIPT_ABOUT = """\
# Written by mvmci, anew with each program. `mvmci down` removes it.
# A line of cron, or another init, runs it after a boot: that line stays the same.
"""


def service_name(cluster: str) -> str:
    """What systemd calls it."""
    return f"mvmci-{cluster}.service"


def service_text(
    program: Sequence[str],
    root: Path,
    cluster: str,
    kind: Literal["system", "user"],
    environment: Mapping[str, str] = {},
) -> str:
    """The text of the service that keeps the units of `cluster`, whose state lies in `root`, running.

    Raises Usage for a word that has a control character.
    """
    system = kind == "system"
    command = [*program, "supervise", "--resume", "--cluster", cluster]
    given = {"MVMCI_STATE": str(root)} | dict(environment)
    private_tmp = not any(root.is_relative_to(place) for place in ("/tmp", "/var/tmp"))  # noqa: S108
    return TEXT.format(
        cluster=cluster,
        after="Wants=network-online.target\nAfter=network-online.target\n" if system else "",
        command=" ".join(_quoted(word).replace("$", "$$") for word in command),
        environment="\n".join(f"Environment={_quoted(f'{key}={value}')}" for key, value in given.items())
        + ("\nUser=root" if system else ""),  # which has HOME set
        log=_unescaped(str(root / cluster / "supervisor.log")),
        watchdog_s=WATCHDOG_S,
        stop_s=STOP_S,
        hardening=HARDENING.format(private_tmp="PrivateTmp=yes\n" if private_tmp else "")
        if system
        else "NoNewPrivileges=yes\n",
        wanted_by="multi-user.target" if system else "default.target",
    )


def _unescaped(word: str) -> str:
    """`word`, of which systemd is to make nothing else."""
    if not word.isprintable():
        raise Usage(f"{word!r} cannot stand in a service of systemd", hint="use a path without line breaks")
    return word.replace("%", "%%")


def _quoted(word: str) -> str:
    escaped = _unescaped(word).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if set(escaped) & set(" '\"\\;") else escaped


# ---- On this host


def choose(wanted: Literal["auto", "system", "user", "none"] = "auto") -> Kind:
    """What a cluster's supervisor is to be on this host. Raises Usage where it cannot be what is `wanted`.

    "auto": a service where it then survives the end of a session: of the system for root, of a user's who
    lingers or may; else none.
    """
    booted, root = BOOTED.is_dir(), os.geteuid() == 0
    if wanted == "auto":
        if not booted:
            return "none"
        return "system" if root else "user" if _lingers() else "none"
    if wanted != "none" and not booted:
        raise Usage(f"service {wanted}: this host was not booted with systemd", hint="`service: none`")
    if wanted == "system" and not root:
        raise Usage(
            "service system: only root can have one", hint="`user: root`, or `service: user` for this user"
        )
    return wanted


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _lingers() -> bool:
    """Whether this user's systemd runs without a session, from now on if that is allowed."""
    lingers = LINGERING / _user()
    if not lingers.exists() and shutil.which("loginctl"):
        subprocess.run(["loginctl", "enable-linger"], capture_output=True, check=False)
    return lingers.exists()


@dataclass(frozen=True)
class Service:
    """The service of one cluster. All of it takes as long as systemd does, and raises MvmciError."""

    kind: Literal["system", "user"]
    root: Path
    cluster: str

    @property
    def name(self) -> str:
        return service_name(self.cluster)

    @property
    def file(self) -> Path:
        """Where systemd looks for it."""
        return (SYSTEM_UNITS if self.kind == "system" else Path.home() / USER_UNITS) / self.name

    @property
    def is_there(self) -> bool:
        """Whether it was written for this very cluster."""
        return _state_in(self._text()) == _state_line(self.root)

    def write(self, program: Sequence[str], environment: Mapping[str, str]) -> None:
        """Have the next boot start it, by `program`. One that runs goes on. Raises Usage, too."""
        text, there = service_text(program, self.root, self.cluster, self.kind, environment), self._text()
        if there and not self.is_there:
            raise Usage(
                f"{self.file} is there, and is not of this cluster: its state lies elsewhere",
                hint="give this cluster another name, or bring that one down",
            )
        if self.kind == "user":
            _lingers()
        if text != there:
            self._put(text)
            self._systemctl("daemon-reload")
        self._systemctl("enable", self.name)  # also where somebody was killed who came as far as the file
        sync_folder(self.file.parent)

    def start(self) -> None:
        """Start it, and wait until it can be asked."""
        self._systemctl("reset-failed", self.name, check=False)
        self._systemctl("start", self.name)

    def remove(self) -> None:
        """Stop it, and have systemd know nothing of it."""
        self._systemctl("disable", "--now", self.name)
        self.file.unlink(missing_ok=True)
        self._systemctl("daemon-reload")
        self._systemctl("reset-failed", self.name, check=False)

    def _put(self, text: str) -> None:
        part = self.file.with_name(f".{self.name}.part")
        try:
            if self.kind == "user":
                private_folder(self.file.parent)
            with part.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # the next boot may be one after a power cut
            part.replace(self.file)
        except OSError as error:
            raise Usage(f"{self.file} cannot be written: {error.strerror}", hint="`service: none`") from None

    def _text(self) -> str:
        try:
            return self.file.read_text(errors="replace")
        except OSError:
            return ""

    def _systemctl(self, *words: str, check: bool = True) -> None:
        command = ["systemctl", *(["--user"] if self.kind == "user" else []), "--quiet", *words]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
            raise MvmciError(
                f"`{shlex.join(command)}` failed: {said}",
                hint=f"`systemctl status {self.name}` there says more",
            )


def services(root: Path, cluster: str) -> list[Service]:
    """Those that are there for this cluster, whoever wanted them."""
    kinds: tuple[Literal["system", "user"], ...] = ("system", "user")
    return [found for kind in kinds if (found := Service(kind, root, cluster)).is_there]


def _state_line(root: Path) -> str:
    return f"Environment={_quoted(f'MVMCI_STATE={root}')}"


def _state_in(text: str) -> str:
    return next((line for line in text.splitlines() if "MVMCI_STATE=" in line), "")


def _environment() -> dict[str, str]:
    """Ours, in which `systemctl --user` finds the user's systemd: after a login by ssh it may be missing."""
    folder = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    if os.geteuid() != 0:
        end = time.monotonic() + MANAGER_S
        while not Path(folder, "systemd/private").exists() and time.monotonic() < end:
            time.sleep(0.05)  # nobody tells when it is there that was just asked for
    return os.environ | {"XDG_RUNTIME_DIR": folder}


# ---- In the supervisor


def notify(state: str) -> None:
    """Tell the systemd that started this process how it is, if one did: `READY=1`, `WATCHDOG=1`."""
    address = os.environ.get(NOTIFY_SOCKET, "")
    if address:
        at = f"\0{address[1:]}" if address.startswith("@") else address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
            sending.sendto(state.encode(), at)


async def notify_always() -> None:
    """Tell it again and again that this loop turns, if it wants to be told."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    while usec.isdecimal() and os.environ.get("WATCHDOG_PID") == str(os.getpid()):
        notify("WATCHDOG=1")
        await asyncio.sleep(int(usec) / 1e6 / 3)


# ---- Where nobody starts it


def boot_script(program: Sequence[str], root: Path, cluster: str, environment: Mapping[str, str] = {}) -> str:
    """What becomes the supervisor of the units that are wanted, for `sh`: the same as the service starts."""
    told = [f"{key}={value}" for key, value in ({"MVMCI_STATE": str(root)} | dict(environment)).items()]
    command = ["env", *told, *program, "supervise", "--resume", "--cluster", cluster]
    log = shlex.quote(str(root / cluster / "supervisor.log"))
    return f"{BOOT_SCRIPT_ABOUT}exec {shlex.join(command)} </dev/null >>{log} 2>&1\n"


def after_boot(service: Kind, script: Path) -> str:
    """One sentence on what makes this host start its units after a boot; empty where that is so. `script` is
    the file of `boot_script`."""
    if service == "system" or (service == "user" and (LINGERING / _user()).exists()):
        return ""
    if service == "user":
        return (
            f"units end when the last session of {_user()} does: "
            f"`sudo loginctl enable-linger {_user()}` makes them stay, and come back after a boot"
        )
    if BOOTED.is_dir() and os.geteuid() != 0:
        return (
            f"nothing starts units after a boot: `sudo loginctl enable-linger {_user()}`, and then "
            "`mvmci up` again, has this user's systemd do it"
        )
    line = shlex.join(["sh", str(script)])
    if shutil.which("crontab"):
        line = line.replace("%", r"\%")
        return f"nothing starts units after a boot; this line in `crontab -e` does: @reboot {line}"
    return f"nothing starts units after a boot; put this under the host's init: {line}"
