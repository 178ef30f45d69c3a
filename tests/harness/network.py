"""A network of its own on one machine: a switch, and namespaces that are plugged into it.

    this machine      198.18.N.1 (of the range that is set apart for tests of networks), a veth into
    the switch        a bridge, in a namespace: no firewall of this machine is between two that are plugged in
    a namespace       198.18.N.2 and up, at the other end of a veth pair

Unplugging takes the switch's end of a line down: packets are lost without a word, as when a cable is drawn.
All of it goes away with the block, and with every process that still runs in one of the namespaces. N is the
lowest number that no other process has, so that whoever comes next also removes what somebody left there who
was killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.waiting import until

NETWORKS_MAX = 512
NAMESPACES_MAX = 250
NETNS = Path("/run/netns")


def missing() -> str:
    """Why there can be no network here; empty if there can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    return "" if shutil.which("ip") else "ip (iproute2) is not there"


@dataclass(frozen=True)
class Namespace:
    """A namespace, plugged into the switch by its own line."""

    name: str
    address: str
    line: str  # the switch's end
    switch: str

    @property
    def inside(self) -> tuple[str, ...]:
        """What to put before a command so that it runs there."""
        return ("ip", "netns", "exec", self.name)

    @property
    def path(self) -> Path:
        return NETNS / self.name

    def unplug(self) -> None:
        _ip(f"link set {self.line} down", self.switch)

    def plug(self) -> None:
        _ip(f"link set {self.line} up", self.switch)

    def hide(self) -> None:
        """Let this machine not reach it any more, nor others that are hidden: the rest still do."""
        _ip(f"link set {self.line} type bridge_slave isolated on", self.switch)


@dataclass
class Network:
    """A switch and what is plugged into it. `address` is this machine's."""

    number: int
    namespaces: list[Namespace] = field(default_factory=list)

    @property
    def mark(self) -> str:
        """With what all that is named by this network begins, on this machine."""
        return f"mvmci-{self.number}-"

    @property
    def switch(self) -> str:
        return f"{self.mark}switch"

    @property
    def address(self) -> str:
        return self._address(1)

    @property
    def _line(self) -> str:
        """This machine's end of its line."""
        return f"mvmci{self.number}"

    def _address(self, last: int) -> str:
        return f"198.{18 + self.number // 256}.{self.number % 256}.{last}"

    def add(self, name: str) -> Namespace:
        """A new namespace, plugged in."""
        assert name != "switch"
        number = len(self.namespaces) + 2
        assert number < NAMESPACES_MAX
        found = Namespace(f"{self.mark}{name}", self._address(number), f"line{number}", self.switch)
        self.namespaces.append(found)
        ends = f"{found.line} netns {self.switch} type veth peer eth0 netns {found.name}"
        _ip(f"netns add {found.name}\nlink add {ends}")
        _ip(f"link set {found.line} master bridge up", self.switch)
        _ip(f"link set lo up\naddr add {found.address}/24 dev eth0\nlink set eth0 up", found.name)
        return found

    def open(self) -> None:
        """Make the switch, and remove what was left of another's."""
        self.close()
        _ip(f"netns add {self.switch}\nlink add {self._line} type veth peer eth0 netns {self.switch}")
        # Isolated, so that it is cut off from those that are isolated too: they are hidden.
        _ip(
            "link add bridge type bridge\nlink set bridge up\nlink set eth0 master bridge up\n"
            "link set eth0 type bridge_slave isolated on",
            self.switch,
        )
        _ip(f"addr add {self.address}/24 dev {self._line}\nlink set {self._line} up")

    def close(self) -> None:
        """End what runs in it, and remove it."""
        names = [path.name for path in NETNS.glob(f"{self.mark}*")]
        until(lambda: not _kill(names))
        # The lines go with their namespaces, but in a while, and the name of this one is used again.
        if Path(f"/sys/class/net/{self._line}").exists():
            _ip(f"link del {self._line}")
        _ip("".join(f"netns del {name}\n" for name in names))
        self.namespaces.clear()


@contextmanager
def network() -> Iterator[Network]:
    """A network that no other process uses. It is removed with the block."""
    number, held = _take_number()
    with held:
        found = Network(number)
        try:
            found.open()
            yield found
        finally:
            found.close()


def _take_number() -> tuple[int, socket.socket]:
    """A number, ours as long as the socket is open: the kernel lets go of it however we end."""
    for number in range(NETWORKS_MAX):
        held = socket.socket(socket.AF_UNIX)
        with suppress(OSError):
            held.bind(f"\0mvmci-tests-network-{number}")
            return number, held
        held.close()
    raise AssertionError("every number of a network is taken")


def _kill(names: list[str]) -> bool:
    """Kill what runs in these namespaces; whether anything did."""
    inodes, any_left = {(NETNS / name).stat().st_ino for name in names}, False
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile
            if (process / "ns/net").stat().st_ino in inodes:
                any_left = True
                os.kill(int(process.name), signal.SIGKILL)
    return any_left


def _ip(commands: str, namespace: str | None = None) -> None:
    """Run lines of `ip`, in a namespace."""
    inside = ["-n", namespace] if namespace else []
    done = subprocess.run(
        ["ip", *inside, "-batch", "-"], input=commands, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{commands}: {done.stderr}"
