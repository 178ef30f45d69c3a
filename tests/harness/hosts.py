"""Hosts on one machine, with real sshd: some with real systemd, some without an init.

Each lies in a network namespace with its own address, on a disk of its own over one Debian that all share. It
has `root` and a user `ci`, who let in the key of these tests, and a host key that it keeps. Its disk outlives
power cuts and reboots; what is in /run, /tmp of systemd's and /dev/shm does not.

    systemd      systemd-nspawn -b: units, user units (`ci` lingers), logind, journald, cron
    bare         namespaces of mounts, processes and names with sshd as the first process, and cron

    DISK/key, key.pub           what the hosts let in
    DISK/known_hosts            their host keys
    DISK/NAME/upper             what a host's disk has that the shared Debian has not
    DISK/NAME/console           what it said while it booted

Mounts are in namespaces of the hosts alone, and all of a host's processes in a cgroup of its own: when that
is killed, nothing is left but the disk. A network that somebody left who was killed takes its hosts with it
when its number is used again.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness import debian, network
from tests.harness.network import Namespace, Network
from tests.harness.places import need
from tests.harness.waiting import until

TOOLS = ("debootstrap", "nsenter", "ssh", "ssh-keygen", "systemd-nspawn", "unshare")
PORT = 22
USERS = ("root", debian.USER)
STARTING_MAX = 8  # at a time
# As an init gives what it ends: long enough for what listens to SIGTERM.
STOP_S = 10.0
CGROUPS = Path("/sys/fs/cgroup")
IN_MEMORY = ("run", "tmp", "dev/shm")
# The user of `debian.tree` has the same number on each.
OWNERS = {"root": 0, debian.USER: debian.USER_ID}
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

# $1 is the shared Debian, $2 the folder of the host; then its name, its network and, for systemd-nspawn, a
# name that no other host of this machine has.
MOUNT = 'mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"\n'
# It would keep a folder for each host in /run/systemd. Its own filter of system calls knows no Landlock.
SYSTEMD = MOUNT + textwrap.dedent("""\
    mkdir -p /run/systemd
    mount -t tmpfs tmpfs /run/systemd
    exec systemd-nspawn --quiet --boot --directory="$2/root" --machine="$5" --hostname="$3" \\
        --network-namespace-path="$4" --register=no --keep-unit --kill-signal=SIGRTMIN+3 --capability=all \\
        --system-call-filter='landlock_create_ruleset landlock_add_rule landlock_restrict_self' \\
        --console=pipe --link-journal=no --resolv-conf=off --timezone=off
""")
BARE = MOUNT + textwrap.dedent("""\
    hostname "$3"
    cd "$2/root"
    mount -t proc proc proc
    mount -t sysfs -o ro sysfs sys
    mount -t tmpfs -o mode=755 tmpfs run
    mount -t tmpfs -o mode=755 tmpfs dev
    mkdir run/sshd run/lock dev/shm dev/pts
    mount -t tmpfs -o mode=1777 tmpfs dev/shm
    mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts dev/pts
    for one in full null random tty urandom zero; do cp -a "/dev/$one" dev/; done
    ln -s pts/ptmx dev/ptmx
    ln -s /proc/self/fd dev/fd
    pivot_root . mnt
    exec chroot . sh -euc 'umount -l /mnt; cron; exec /usr/sbin/sshd -D -e'
""")


@dataclass(frozen=True)
class Group:
    """A cgroup of version 2, and one of systemd's own where this machine has both versions."""

    name: str

    @property
    def _folders(self) -> list[Path]:
        both = [CGROUPS / "unified", CGROUPS / "systemd"]
        return [one / self.name for one in both if one.is_dir()] or [CGROUPS / self.name]

    def make(self) -> list[Path]:
        """Make it; into each of these files, a process writes its number to be in it."""
        for folder in self._folders:
            folder.mkdir(exist_ok=True)
        return [folder / "cgroup.procs" for folder in self._folders]

    def pids(self) -> list[int]:
        """The processes in it and in those below it, by their numbers on this machine."""
        found = []
        for folder, _, _ in os.walk(self._folders[0]):
            with suppress(OSError):  # gone meanwhile
                found += [int(pid) for pid in Path(folder, "cgroup.procs").read_text().split()]
        return found

    def cpu_s(self) -> float:
        """The seconds of a processor that all had which ever ran in it."""
        told = (self._folders[0] / "cpu.stat").read_text().split()
        return int(told[told.index("usage_usec") + 1]) / 1e6

    def kill(self) -> None:
        """SIGKILL to everything in it at once; returns when nothing is."""
        with suppress(FileNotFoundError):
            (self._folders[0] / "cgroup.kill").write_text("1")
        until(lambda: not self.pids(), self.pids)

    def remove(self) -> None:
        """End what is in it, and it."""
        self.kill()
        for folder in self._folders:
            for below, _, _ in os.walk(folder, topdown=False):
                until(functools.partial(_removed, Path(below)))

    @classmethod
    def named(cls, mark: str) -> set[Group]:
        """Those whose names begin with `mark`."""
        return {cls(path.name) for where in cls("")._folders for path in where.glob(f"{mark}*")}


@dataclass(eq=False)
class Host:
    """A host. It runs when it is made, and whatever is done to it returns when it is done."""

    name: str
    has_systemd: bool
    namespace: Namespace
    folder: Path  # of its disk
    key: Path  # what its users let in
    group: Group
    _carrier: subprocess.Popen[bytes] | None = None  # what its first process is a child of

    @property
    def address(self) -> str:
        return self.namespace.address

    @property
    def host_key(self) -> str:
        """Its public key, as `ssh-ed25519 AAAA…`."""
        public = self.folder / "upper/etc/ssh/ssh_host_ed25519_key.pub"
        return " ".join(public.read_text().split()[:2])

    @property
    def is_on(self) -> bool:
        return bool(self.group.pids())

    # ---- Its line and its power

    def unplug(self) -> None:
        """Draw its cable: nobody reaches it, and nobody is told."""
        self.namespace.unplug()

    def plug(self) -> None:
        self.namespace.plug()

    def power_cut(self) -> None:
        """End all that runs there at once, without a word. What was written is on its disk."""
        self.group.kill()
        self._end()

    def shut_down(self) -> None:
        """End what runs there as its init does."""
        if self.has_systemd:
            os.kill(self._first(), signal.SIGRTMIN + 3)
            until(lambda: not self.is_on, self.console)
        else:
            for pid in set(self._inside()) - {self._first()}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            end = time.monotonic() + STOP_S
            until(lambda: len(self._inside()) == 1 or time.monotonic() > end, self.processes)
            self.group.kill()
        self._end()

    def boot(self) -> None:
        """Start it; returns when sshd listens and lets its users in."""
        self._end()
        joins = "".join(f"echo $$ >{path}; " for path in self.group.make())
        own = ["unshare", "--mount"]
        if not self.has_systemd:
            own = [
                *self.namespace.inside,
                *own,
                "--pid",
                "--uts",
                "--ipc",
                "--cgroup",
                "--fork",
                "--kill-child",
            ]
        script = SYSTEMD if self.has_systemd else BARE
        values = [debian.tree(), self.folder, self.name, self.namespace.path, self.namespace.name]
        with open(self.folder / "console", "ab") as console:
            self._carrier = subprocess.Popen(
                ["sh", "-euc", f'{joins}exec "$@"', "sh", *own, "sh", "-euc", script, "sh", *values],
                cwd="/",
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        until(self._lets_in, self.console)

    def reboot(self) -> None:
        """As its init does it."""
        self.shut_down()
        self.boot()

    # ---- What is there

    def ssh(self, *command: str, user: str = "root") -> subprocess.CompletedProcess[str]:
        """What a command does there that `user` gives by ssh. It ends with 255 where ssh itself failed."""
        given = self.by_ssh(*command, user=user)
        return subprocess.run(given, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    def by_ssh(self, *command: str, user: str = "root") -> list[str | Path]:
        """What runs, here, a command there."""
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": "5",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": self.folder.parent / "known_hosts",
            "GlobalKnownHostsFile": "none",
        }
        given = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
        return ["ssh", "-F", "none", "-i", self.key, *given, f"{user}@{self.address}", shlex.join(command)]

    def run(self, *command: str) -> str:
        """What a command says that is run there as root and not by ssh; it has to succeed."""
        enter = ["nsenter", "--target", str(self._first()), "--all", "--wd=/", "--"]
        done = subprocess.run(
            [*enter, *command],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (self.name, command, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    def processes(self) -> dict[int, str]:
        """What runs there: the command of each process, by its number on this machine."""
        found = {}
        for pid in self._inside():
            with suppress(OSError):  # gone meanwhile
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                found[pid] = command.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        return found

    def files(self) -> dict[str, Path]:
        """What lies there that the shared Debian has not: where, as the host calls it, and where to read it.

        What the host changed of that Debian's is among it; what is in its memory, if it runs.
        """
        base, upper, found = debian.tree(), self.folder / "upper", {}
        places = [upper, *(self._root / place for place in IN_MEMORY)] if self.is_on else [upper]
        for place in places:
            root = upper if place == upper else self._root
            for folder, folders, files in os.walk(place):
                there = Path(folder).relative_to(root)
                new = [name for name in folders if not (base / there / name).is_dir()]
                found |= {f"/{there / name}": Path(folder, name) for name in (*new, *files)}
        return found

    def write(self, path: str, data: str | bytes, mode: int = 0o644, user: str = "root") -> None:
        """Make a file there, whether it runs or not."""
        owner, file = OWNERS[user], self._root / path.lstrip("/")
        for folder in reversed(file.relative_to(self._root).parents):
            known, made = debian.tree() / folder, self._root / folder
            if not made.exists():
                made.mkdir(mode=0o700 if user in folder.parts else 0o755)
                like = known.stat() if known.exists() else None
                os.chown(made, like.st_uid if like else owner, like.st_gid if like else owner)
                made.chmod(like.st_mode if like else 0o700)
        file.touch(mode=mode)
        os.chown(file, owner, owner)
        file.write_bytes(data.encode() if isinstance(data, str) else data)

    def change_key(self) -> None:
        """Give it another host key, which its sshd has as this returns. `known_hosts` keeps the old one."""
        _make_key(new := self.folder / "new-key")
        for suffix, mode in (("", 0o600), (".pub", 0o644)):
            self.write(f"/etc/ssh/ssh_host_ed25519_key{suffix}", Path(f"{new}{suffix}").read_text(), mode)
        if self.is_on:
            self.run(*(("systemctl", "reload", "ssh") if self.has_systemd else ("kill", "-HUP", "1")))
            scan = ("sh", "-c", "ssh-keyscan -t ed25519 127.0.0.1 || true")  # nobody listens for a moment
            until(lambda: self.host_key in self.run(*scan))

    def console(self) -> str:
        """What it said while it booted."""
        return (self.folder / "console").read_text(errors="replace")[-2000:]

    # ---- Below

    def _end(self) -> None:
        """Have done with the host that was on before, and is off."""
        assert not self.is_on
        if self._carrier:
            self._carrier.wait()

    @property
    def _root(self) -> Path:
        """Its files: as they are mounted there if it runs, else its disk."""
        return Path(f"/proc/{self._first()}/root") if self.is_on else self.folder / "upper"

    def _inside(self) -> list[int]:
        """Its processes, without those of this machine that carry it."""
        return [pid for pid in self.group.pids() if len(_numbers(pid)) > 1]

    def _first(self) -> int:
        """Its first process."""
        (found,) = (pid for pid in self._inside() if _numbers(pid)[1:] == ["1"])
        return found

    def _lets_in(self) -> bool:
        """Whether sshd listens, and PAM lets in whoever is not root."""
        with suppress(OSError, ValueError):  # it has no first process yet
            first = Path(f"/proc/{self._first()}")
            sockets = [line.split() for line in (first / "net/tcp").read_text().splitlines()[1:]]
            listens = any(one[3] == "0A" and one[1].endswith(f":{PORT:04X}") for one in sockets)
            return listens and not (first / "root/run/nologin").exists()
        return False


@dataclass
class Hosts:
    """The hosts of a test, and the network that they are in."""

    network: Network
    folder: Path
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def key(self) -> Path:
        """The private key that the users of all of them let in."""
        return self.folder / "key"

    @property
    def known_hosts(self) -> Path:
        """The keys that hosts had when they were made, by their addresses."""
        return self.folder / "known_hosts"

    @property
    def address(self) -> str:
        """This machine's, as all but hidden hosts reach it: of a server that counts, for example."""
        return self.network.address

    def add(self, *names: str, systemd: bool) -> list[Host]:
        """New hosts, which run. They boot at the same time."""
        made = [self._make(name, systemd) for name in names]
        with ThreadPoolExecutor(STARTING_MAX) as starting:
            list(starting.map(Host.boot, made))
        return made

    def hide(self, *hosts: Host) -> None:
        """Let only other hosts reach these: from here, one of those is to be jumped over."""
        for host in hosts:
            host.namespace.hide()

    def _make(self, name: str, systemd: bool) -> Host:
        namespace = self.network.add(name)
        folder = self.folder / name
        host = Host(name, systemd, namespace, folder, self.key, Group(namespace.name))
        for part in ("upper", "work", "root"):
            (folder / part).mkdir(parents=True)
        (folder / "upper").chmod(0o755)
        if systemd:
            host.write("/etc/machine-id", f"{os.urandom(16).hex()}\n", 0o444)
        host.write("/etc/hosts", f"127.0.0.1 localhost\n{host.address} {name}\n")
        public = Path(f"{self.key}.pub").read_text()
        host.write("/root/.ssh/authorized_keys", public, 0o600)
        host.write(f"/home/{debian.USER}/.ssh/authorized_keys", public, 0o600, debian.USER)
        host.change_key()
        with open(self.known_hosts, "a") as known:
            known.write(f"{host.address} {host.host_key}\n")
        self.hosts[name] = host
        return host


@contextmanager
def hosts(folder: Path) -> Iterator[Hosts]:
    """Hosts, with their disks in `folder`. They are removed with the block, and what ran there."""
    need(not (reason := missing()), reason)
    debian.tree()
    with network.network() as found:
        made = Hosts(found, folder)
        try:
            _remove(found)
            folder.mkdir(parents=True, exist_ok=True)
            _make_key(made.key)
            yield made
        finally:
            for host in made.hosts.values():
                host.power_cut()
            _remove(found)
            for host in made.hosts.values():
                # Of a run that was interrupted, pytest may be removing all that it left.
                shutil.rmtree(host.folder, ignore_errors=True)


def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    if reason := network.missing():
        return reason
    lacks = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacks:
        return f"{', '.join(lacks)}: apt-get install debootstrap openssh-client systemd-container util-linux"
    folder = Group("").make()[0].parent
    return "" if (folder / "cgroup.controllers").exists() else "no cgroups of version 2 are mounted here"


def _remove(of: Network) -> None:
    """End the hosts of a network, and remove what this machine has of them but their disks."""
    for group in Group.named(of.mark):
        group.remove()


def _removed(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        pass
    except OSError:
        return False  # what was killed is still going
    return True


def _make_key(path: Path) -> None:
    for old in (path, Path(f"{path}.pub")):
        old.unlink(missing_ok=True)
    command: Sequence[str | Path] = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)


def _numbers(pid: int) -> list[str]:
    """The numbers of a process, in each namespace of processes from this machine's on; none if it is gone."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(line.split()[1:] for line in lines if line.startswith("NSpid:"))
    return []
