"""The balancer: haproxy in front of executors, so that workers need one URL for all of them.

Writes its configuration and becomes it. A job goes to the executor that has the fewest; one that is full
answers 503, and haproxy then asks another before it passes that on. It knows no slots, so this is right
for executors that have the same number, as those of a pool do. It is no member of the cluster and has no
credential but a certificate: whoever can dial it is asked for the executors' token by the executors.

    <cluster>/units/<name>/haproxy.cfg     made at every start
                           shown.pem       the certificate that it shows, and its key; where it has any
                           trusted.pem     the CA by which it knows executors
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from mvmci.cluster.identity import ENGINE_TLS_NAME
from mvmci.errors import Usage
from mvmci.jobs.job import ID_PATTERN
from mvmci.system.files import write_private
from mvmci.trust.provision import BalancerConfig

SHOWN, TRUSTED = "shown.pem", "trusted.pem"
PLACES = (os.defpath, "/usr/local/sbin", "/usr/sbin")  # where it may be beside PATH
_CONNECTIONS_MAX = 2000
RETRIES_MIN = 3
ORDER_BYTES_MAX = 64 << 10  # a request must fit in a buffer, or haproxy could not send it again
QUIET = "24d"  # a job may say nothing for days, and haproxy counts no longer than this
RESOLVERS = """
resolvers system
    parse-resolv-conf
    hold valid 1s
"""
_ADDRESS = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]):([0-9]{1,5})"
_BACKEND = re.compile(rf"({ID_PATTERN})=(?:{_ADDRESS})")
_LISTEN = re.compile(_ADDRESS)


def find_haproxy() -> str:
    """The haproxy of this machine. Raises Usage."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *PLACES))
    found = shutil.which("haproxy", path=path)
    if found is None:
        raise Usage(
            "haproxy is not installed on this machine, and `executors.balancer` asks for it",
            hint="apt-get install haproxy, or leave `balancer` out: the broker then balances",
        )
    return found


def exec_balancer(
    folder: Path, listen: str, backends: tuple[str, ...], given: BalancerConfig | None = None
) -> NoReturn:
    """Become a balancer that listens at `listen`, `HOST:PORT`, in front of `backends`, `NAME=HOST:PORT`: over
    TLS on both sides where it was `given` what it needs for that.

    Its configuration is laid down in `folder`. Raises Usage.
    """
    haproxy = find_haproxy()
    config, tls = folder / "haproxy.cfg", None
    if given is not None:
        tls = folder
        write_private(folder / SHOWN, f"{given.tls}{given.seed}".encode())
        write_private(folder / TRUSTED, given.ca.encode())
    write_private(config, haproxy_config(listen, _parsed(backends), tls).encode())
    utc = os.environ | {"TZ": "UTC"}  # of the times in its log
    os.execve(haproxy, [haproxy, "-db", "-f", str(config)], utc)  # noqa: S606 (no shell is wanted)


def _parsed(backends: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in backends:
        match = _BACKEND.fullmatch(text)
        if match is None or match[1] in found:
            raise Usage(f"--backend {text!r} is not of the form NAME=HOST:PORT, or its name is there twice")
        found[match[1]] = text.partition("=")[2]
    return found


def haproxy_config(listen: str, backends: Mapping[str, str], tls: Path | None = None) -> str:
    """The configuration of haproxy, for TLS with the certificates in the folder `tls`. Raises Usage."""
    if _LISTEN.fullmatch(listen) is None:
        raise Usage(f"--listen {listen!r} is not of the form HOST:PORT")
    named = {name for name, address in backends.items() if not _is_number(address.rpartition(":")[0])}
    checks = "check inter 500ms fall 3 rise 1 on-marked-down shutdown-sessions init-addr last,libc,none"
    shows, knows = "", ""
    if tls is not None:
        shows = f" ssl crt {quoted(tls / SHOWN)} ssl-min-ver TLSv1.3"
        knows = (
            f" ssl verify required ca-file {quoted(tls / TRUSTED)} verifyhost {ENGINE_TLS_NAME}"
            " ssl-min-ver TLSv1.3"
        )
    servers = "".join(
        f"    server {name} {address}{' resolvers system' if name in named else ''}\n"
        for name, address in backends.items()
    )
    return f"""\
global
    maxconn {_CONNECTIONS_MAX}
    tune.bufsize {ORDER_BYTES_MAX}
    log stdout format iso daemon notice
{RESOLVERS if named else ""}
defaults
    mode http
    log global
    timeout connect 2s
    timeout check 1s
    timeout http-request 10s
    timeout queue 5s
    option http-no-delay
    timeout client {QUIET}
    timeout server {QUIET}
    option clitcpka
    option srvtcpka

listen executors
    bind {listen}{shows}
    balance leastconn
    # An order that nobody took is offered to another. To send one twice is safe: the journal decides.
    retries {max(RETRIES_MIN, len(backends))}
    option redispatch 1
    retry-on conn-failure empty-response 503
    option httpchk GET /health
    http-check expect status 200
    # Who is asked about a job on an executor that is gone must hear of it.
    default-server {checks}{knows}
{servers}"""


def quoted(path: Path) -> str:
    """As haproxy reads one word."""
    return re.sub(r"([^A-Za-z0-9_./-])", r"\\\1", str(path))


def _is_number(host: str) -> bool:
    """Whether `host` is an address, which nobody has to look up again."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
