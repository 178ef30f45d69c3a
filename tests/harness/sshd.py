"""Real sshds on the loopback, each with keys of its own, and somebody who may log in.

They run as whoever runs the tests, who is whom they let in: an ordinary user's sshd lets in nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mvmci.cluster.topology import HostSection
from tests.harness.places import need
from tests.harness.ports import own_port
from tests.harness.waiting import until_true

ADDRESS = "127.0.0.1"
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> str:
    """Make a pair of keys at `path`; the public one, without a comment."""
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    size = ["-b", "2048"] if kind == "rsa" else []
    command = ["ssh-keygen", "-q", "-t", kind, *size, "-N", passphrase, "-C", "", "-f", path]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path.with_name(path.name + ".pub").read_text().strip()


@dataclass
class Sshd:
    """One sshd and its folder, in which is also the home of those who log in."""

    folder: Path
    port: int
    host_keys: Sequence[str]  # the public ones

    @property
    def home(self) -> Path:
        """Where who logs in is at home."""
        return self.folder / "home"

    @property
    def log(self) -> list[str]:
        """What it said."""
        return (self.folder / "log").read_text(errors="replace").splitlines()

    @property
    def authorized_keys(self) -> Path:
        """Whose keys may log in."""
        return self.folder / "authorized_keys"

    def section(self, **settings: object) -> HostSection:
        """It, as a host of a cluster file."""
        return HostSection(address=ADDRESS, port=self.port, **settings)  # type: ignore[arg-type]

    def known(self, number: int = 0) -> str:
        """The line of its key in a file of known hosts."""
        return f"[{ADDRESS}]:{self.port} {self.host_keys[number]}\n"

    async def left(self) -> list[str]:
        """What it said, once everybody has left that came. Who sends a name of a user is told of in there."""
        came, went = (
            "Connection from ",
            ("Connection closed", "Connection reset", "Disconnected", "disconnect:"),
        )

        def count(*words: str) -> int:
            return sum(any(word in line for word in words) for line in self.log)

        await until_true(lambda: count(came) and count(*went) >= count(came))
        return self.log


def find_sshd() -> str:
    """sshd's path; else the test is skipped."""
    found = shutil.which("sshd", path=SBIN)
    need(found and shutil.which("ssh-keygen"), "no sshd: apt-get install openssh-server openssh-client")
    assert found is not None
    return found


@contextlib.asynccontextmanager
async def serve(
    folder: Path, *, kinds: Sequence[str] = ("ed25519",), settings: Mapping[str, object] = {}
) -> AsyncIterator[Sshd]:
    """An sshd on the loopback, with host keys of these kinds, made if they are not in `folder`."""
    program = find_sshd()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(0o755, exist_ok=True)  # where its unprivileged half lives
    folder.mkdir(0o700, parents=True, exist_ok=True)
    keys = [folder / f"host_{kind}" for kind in kinds]
    public = [
        (key.with_suffix(".pub").read_text().strip() if key.exists() else make_key(key, kind))
        for key, kind in zip(keys, kinds, strict=True)
    ]
    sshd = Sshd(folder, own_port(ADDRESS), public)
    sshd.authorized_keys.touch(0o600)
    sshd.home.mkdir(0o700, exist_ok=True)
    (folder / "sshd_config").write_text(_config(sshd, keys, settings))
    log = folder / "log"
    log.write_text("")
    command = [program, "-D", "-E", str(log), "-f", str(folder / "sshd_config")]
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        await until_true(lambda: process.returncode is not None or "Server listening" in log.read_text())
        assert process.returncode is None, sshd.log
        yield sshd
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        _end_sessions(sshd.home)


def _end_sessions(home: Path) -> None:
    """What ran there when a connection was cut runs on, as on any host."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"HOME={home}".encode() in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def user() -> str:
    """Whom they let in."""
    return getpass.getuser()


def _config(sshd: Sshd, keys: Sequence[Path], settings: Mapping[str, object]) -> str:
    told: dict[str, object] = {
        "Port": sshd.port,
        "ListenAddress": ADDRESS,
        "PidFile": "none",
        "AuthorizedKeysFile": sshd.authorized_keys,
        "StrictModes": "no",  # temporary folders lie below one that anybody can write to
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "yes",
        "LogLevel": "DEBUG1",
        "SetEnv": f"HOME={sshd.home}",  # nothing of ours is read, or littered
    }
    lines = [f"{name} {value}" for name, value in (told | dict(settings)).items()]
    return "\n".join([*lines, *(f"HostKey {key}" for key in keys), ""])
