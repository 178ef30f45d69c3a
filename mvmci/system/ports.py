"""Ports and addresses of this machine: which are free, and who can reach them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import ipaddress
import itertools
import os
import re
import socket
from collections.abc import Collection
from pathlib import Path

from mvmci.errors import Usage

PORTS = "20000-31999"  # below those that the kernel gives to connections


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a broker that listens there."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def is_address(host: str) -> bool:
    """Whether that is an IP address, and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def outward_address() -> str:
    """The address that this machine has where its way to others begins; empty where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def own_addresses() -> list[str]:
    """The addresses that this host has now, but for those that are of a link alone. Empty where it tells
    none."""
    found = set()
    with contextlib.suppress(OSError):
        lines = Path("/proc/net/fib_trie").read_text().split("\n")
        for line, after in itertools.pairwise(lines):
            if after.strip() == "/32 host LOCAL":
                found.add(ipaddress.ip_address(line.split()[-1]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            found.add(ipaddress.ip_address(int(line[:32], 16).to_bytes(16, "big")))
    return [str(one) for one in sorted(found, key=lambda one: (one.version, one)) if not one.is_link_local]


def choose_port(name: str, address: str = "127.0.0.1", *, taken: Collection[int] = ()) -> int:
    """A port that nobody listens on and that is not `taken`, for what `name` says. Raises Usage.

    It is one of `MVMCI_PORTS`, and the same again as long as it is free.
    """
    ports = _ports()
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(ports)
    for port in itertools.chain(ports[start:], ports[:start]):
        if port not in taken and _is_free(address, port):
            return port
    raise Usage(
        f"no port of {address} from {ports.start} to {ports.stop - 1} is free",
        hint="name others with MVMCI_PORTS",
    )


def _ports() -> range:
    """Those that may be chosen from. Raises Usage."""
    told = os.environ.get("MVMCI_PORTS") or PORTS
    if found := re.fullmatch(r"(\d{1,5})-(\d{1,5})", told, re.ASCII):
        first, last = int(found[1]), int(found[2])
        if 0 < first <= last < 1 << 16:
            return range(first, last + 1)
    raise Usage(
        f"MVMCI_PORTS is {told[:80]!r}, which is no range of ports",
        hint=f"the first and the last one, as in MVMCI_PORTS={PORTS}",
    )


def _is_free(address: str, port: int) -> bool:
    try:
        check_port(address, port)
    except Usage:
        return False
    return True


def check_port(address: str, port: int) -> None:
    """See that a broker could listen there. Raises Usage."""
    try:
        info = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(info[0], info[1], info[2]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(info[4])
            probe.listen()
    except OSError as error:
        why, hint = _NO_PORT.get(error.errno or 0, (f"cannot be used ({error.strerror})", ""))
        raise Usage(
            f"port {port} of {address} {why}",
            hint=hint or "name another address or port in `broker.listen`",
        ) from None


_NO_PORT = {
    errno.EADDRINUSE: ("is in use", "stop what listens there, or name another port in `broker.listen`"),
    errno.EADDRNOTAVAIL: ("cannot be had: this machine does not have that address", ""),
    errno.EACCES: ("is for root alone", "name one over 1023 in `broker.listen`"),
}
