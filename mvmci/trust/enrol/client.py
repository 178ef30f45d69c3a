"""How a machine gets its identity, and keeps it.

    joiner ── `<cluster>.enrol.<ticket id>`: its key, a name, the ticket's token ──► control plane
           ◄── its name, its token, where to dial ─────────────────────────────────  (`admission`)
    unit   ── `<cluster>.renew.<unit>`: its token ─────────────────────────────────►
           ◄── a newer one, or the same while that is good ────────────────────────

Promised: a key is made where it is used, and is on disk before anybody hears of it, so that an answer
that was lost is asked for again and uses nothing up. An identity survives restarts; a ticket is looked
at only where there is none, or none that is still good.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import os
import re
import shlex
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

from mvmci import __version__
from mvmci.cluster.identity import TICKET_CHARS_MAX, Identity, Login, Ticket, UnitRole, decode_ticket
from mvmci.config.text import decode_text
from mvmci.errors import MvmciError, StoreUnavailable, TicketRefused, Usage, VersionsDiffer
from mvmci.jobs.job import check_id
from mvmci.jobs.summary import rfc3339
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link
from mvmci.system import keys
from mvmci.system.clock import wall_clock_ms
from mvmci.system.files import write_private
from mvmci.trust import tokens
from mvmci.trust.authority import Authority, as_unit, read_identity, write_identity
from mvmci.trust.certificate import Certificate, CertificateRequest
from mvmci.trust.known import CLIENT, KEYS, find_cluster, identity_path
from mvmci.wire import HINT, OLDEST, WIRE, is_understood

PROTOCOL = 4  # the number of these messages at level 0 of `mvmci.wire`; each level counts on
ASK_S = 30.0  # how long somebody is waited for who answers
ASK_PAUSE_S = 0.5
RENEW_LOOK_S = 60.0  # a unit looks so often whether its token wants renewing: its machine may have slept
RENEW_PAUSE_S = 5.0
HOST_CHARS_MAX = 50
ANOTHER_TICKET = "`mvmci ticket create`, where the cluster was brought up, makes another"
TICKET_FILE = "MVMCI_TICKET_FILE"

log = logging.getLogger(__name__)
Because = Literal["", "key", "name"]


class EnrolRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a joiner or a unit sends. `token` is the ticket's, or its own; `proof` is a joiner's.

    It does not know the level of the cluster yet: `protocol` says the oldest that it understands, `wire` the
    newest.
    """

    protocol: int
    version: str = ""
    token: str = ""
    key: str = ""  # public
    proof: str = ""  # what `prove` says of it
    name: str = ""  # empty: one of the host's
    host: str = ""
    wire: int = 0
    certificate: CertificateRequest | None = None  # of an executor that renews


class EnrolReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the control plane says. `refused` is a sentence, `hint` what to do about it.

    `protocol` says the level of the cluster.
    """

    protocol: int
    version: str
    refused: str = ""
    hint: str = ""
    because: str = ""  # a `Because`; of one of these: with another one, the ticket may do
    unit: str = ""
    role: UnitRole | None = None
    queues: tuple[str, ...] = ()
    jwt: str = ""  # empty where a login is lent
    urls: tuple[str, ...] = ()  # empty: where it dialled
    certificate: str = ""  # with that of who signed it, in PEM


def prove(seed: str, ticket: str) -> str:
    """That who asks with `ticket` has the key of `seed`: public keys of units can be read by all."""
    return base64.b64encode(keys.sign(seed, _proven(ticket))).decode()


def is_proven(key: str, ticket: str, proof: str) -> bool:
    """Whether `proof` is what `prove` says of the public `key`."""
    try:
        return keys.verify(key, _proven(ticket), base64.b64decode(proof, validate=True))
    except (binascii.Error, ValueError):
        return False


def _proven(ticket: str) -> bytes:
    return f"enrol with {ticket}".encode()


_encode = msgspec.json.Encoder().encode
_answers = msgspec.json.Decoder(EnrolReply)


class _Numbered(msgspec.Struct, frozen=True):
    """All that is read of an answer before its level is known."""

    protocol: int
    version: str = ""


_numbered = msgspec.json.Decoder(_Numbered)


# Getting one.


def read_ticket(text: str | None) -> Ticket:
    """The ticket that `text` is: itself, `@file`, `-` for standard input, or that of MVMCI_TICKET_FILE.

    Raises TicketRefused, Usage.
    """
    if text is None:
        file = os.environ.get(TICKET_FILE)
        if not file:
            raise Usage("there is no ticket", hint=f"name one: TICKET, @FILE, -, or {TICKET_FILE}")
        text = f"@{file}"
    if text.startswith("@"):
        path = Path(text[1:])
        try:
            with path.open("rb") as opened:
                text = decode_text(opened.read(4 * TICKET_CHARS_MAX))
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise Usage(f"the ticket file {path} cannot be read: {why}") from None
    elif text == "-":
        text = decode_text(sys.stdin.buffer.read(4 * TICKET_CHARS_MAX))
    return decode_ticket(text)


def host_name() -> str:
    """This machine's name, as far as it can be the name of a unit."""
    return host_label(socket.gethostname()) or "host"


def host_label(name: str) -> str:
    """As much of a host's name as can be the name of a unit; may be empty."""
    label = re.sub(r"[^a-z0-9]+", "-", name.split(".")[0].lower()).strip("-")
    return label[:HOST_CHARS_MAX].strip("-")


async def identity_of(
    state: Path,
    cluster: str | None,
    name: str | None,
    *,
    role: UnitRole,
    join: str | None,
) -> tuple[Identity, Path]:
    """Who a unit is that was started with these options, and where that is kept.

    With a ticket it enrols, unless it has done so before: then it goes on as who it is, and the ticket may
    be gone. Raises Usage, StoreUnavailable, TicketRefused, VersionsDiffer.
    """
    if name is not None:
        check_id(name, "unit name")
    if join is None and (cluster is not None or not os.environ.get(TICKET_FILE)):
        return _kept(state, cluster, name, role)
    try:
        ticket = read_ticket(join)
    except (TicketRefused, VersionsDiffer, Usage) as unusable:
        with suppress(MvmciError):
            identity, path = _kept(state, cluster, name, role)
            log.info("%s; this is %s already, which needs none", unusable.message, identity.unit)
            return identity, path
        raise
    if cluster is not None and cluster != ticket.cluster:
        raise Usage(f"the ticket is for cluster {ticket.cluster}, not for {cluster}")
    check_role(ticket, role)
    check_cluster(state / ticket.cluster, ticket)
    path = _place(state, ticket.cluster, name, role)
    there = read_identity(path)
    if there is not None and there.role != role:
        raise Usage(f"{there.unit} is {_a(there.role)} of this machine", hint="choose another --name")
    return await enrol(ticket, path, name=name or ""), path


def _kept(state: Path, cluster: str | None, name: str | None, role: UnitRole) -> tuple[Identity, Path]:
    """Who a unit is that comes without a ticket."""
    cluster = find_cluster(state, cluster)
    path = _place(state, cluster, name, role)
    identity = read_identity(path)
    if identity is None or identity.role != role:
        several = ", ".join(_joined(state, cluster, role))
        raise StoreUnavailable(
            f"there is no {role} {name or host_name()} of cluster {cluster} on this machine",
            hint=f"there is {several}: name it with --name"
            if several
            else "join with a ticket: --join TICKET; `mvmci ticket create` makes one",
        )
    return identity, path


def _place(state: Path, cluster: str, name: str | None, role: UnitRole) -> Path:
    """Where a unit keeps who it is. One that was given no name is the one that joined here without one, or
    the only one, whatever this host is called by now."""
    if name is not None:
        return identity_path(state, cluster, name)
    joined = _joined(state, cluster, role)
    if host_name() in joined:
        return identity_path(state, cluster, host_name())
    mine = [folder for folder, one in joined.items() if not one.named] or list(joined)
    if len(mine) == 1:
        return identity_path(state, cluster, mine[0])
    own = identity_path(state, cluster, host_name())
    return identity_path(state, cluster, f"{host_name()}-{role}") if own.exists() else own


def _joined(state: Path, cluster: str, role: UnitRole) -> dict[str, Identity]:
    """The units of `role` that joined from here, by their folders: without those that `up` gave a config."""
    found = {}
    for path in sorted((state / cluster / "units").glob("*/identity.json")):
        identity = read_identity(path)
        if identity is not None and identity.role == role and not path.with_name("config.json").exists():
            found[path.parent.name] = identity
    return found


def check_cluster(folder: Path, ticket: Ticket) -> None:
    """Raises TicketRefused where `folder` is of another cluster than the ticket, under the same name."""
    files = (folder / CLIENT, *folder.glob("units/*/identity.json"))
    known = {_origin(there.login) for path in files if (there := read_identity(path)) is not None}
    brought_up = (folder / KEYS).is_dir()
    if brought_up:
        here = Authority.load(folder)
        known = {_origin(here.external) if here.external is not None else here.issuer}
    if known and _origin(ticket.login) not in known:
        forget = "" if brought_up else f"; `rm -r {shlex.quote(str(folder))}` forgets it, if it is no more"
        raise TicketRefused(
            f"the ticket is of another cluster {ticket.cluster} than the one that this machine knows, "
            "with other keys",
            hint=f"--state DIR keeps the two apart{forget}",
        )


def _origin(login: Login) -> str:
    """What cluster a login is of: its names may be taken twice, but not who signs for it, or its broker."""
    claims = tokens.peek(login.jwt)
    return claims.origin if claims is not None else ", ".join(login.urls)


def _check_origin(given: Login, known: Login) -> None:
    """Raises TicketRefused where a control plane gives a token that says another cluster than what is known:
    by that a unit tells who may offer it a program, and no control plane may say."""
    if _origin(given) != _origin(known):
        raise TicketRefused(
            "the control plane gives a token of another cluster than its own",
            hint="somebody else may have its host: see `mvmci ps` where the cluster was brought up",
        )


def check_role(ticket: Ticket, role: UnitRole) -> None:
    """Raises TicketRefused when `ticket` is for another role."""
    if ticket.role != role:
        verb = "mvmci login" if ticket.role == "client" else f"mvmci {ticket.role} --join"
        raise TicketRefused(
            f"this ticket is for {_a(ticket.role)}, not for {_a(role)}",
            hint=f"use it with `{verb}`, or make one with `mvmci ticket create --role {role}`",
        )


def _a(role: str) -> str:
    return f"an {role}" if role == "executor" else f"a {role}"


async def enrol(ticket: Ticket, path: Path, *, name: str = "") -> Identity:
    """The identity that `ticket` gives this machine, kept at `path`.

    One that is there is taken as it is, unless the ticket is newer; and also then, if the ticket is
    refused. Raises TicketRefused, VersionsDiffer, StoreUnavailable when nobody answers, Usage for a name.
    """
    there = read_identity(path)
    good = there is not None and _is_of(there, ticket)
    if there is not None and good and not _is_newer(ticket, there):
        return there
    try:
        seed = _seed(path, there)
        answer = await _ask_to_enrol(ticket, seed, name)
        if answer.because == "key":
            seed = _new_seed(path)
            answer = await _ask_to_enrol(ticket, seed, name)
        identity = msgspec.structs.replace(_granted(ticket, answer, seed), named=bool(name))
    except (TicketRefused, StoreUnavailable):
        if there is not None and good:
            return there
        raise
    write_identity(path, identity)
    _seed_file(path).unlink(missing_ok=True)
    return identity


def _granted(ticket: Ticket, answer: EnrolReply, seed: str) -> Identity:
    if answer.refused or answer.role is None:
        kind = Usage if answer.because == "name" else TicketRefused
        raise kind(answer.refused, hint=answer.hint or None)
    login = msgspec.structs.replace(ticket.login, urls=answer.urls or ticket.login.urls)
    if answer.jwt:  # else the ticket's own login is lent to all
        login = as_unit(login, ticket.cluster, answer.role, answer.unit, jwt=answer.jwt, seed=seed)
        _check_origin(login, ticket.login)
    return Identity(
        cluster=ticket.cluster, unit=answer.unit, role=answer.role, queues=answer.queues, login=login
    )


def _is_of(there: Identity, ticket: Ticket) -> bool:
    """Whether an identity is what `ticket` would give, and has not expired."""
    if (there.cluster, there.role, there.queues) != (ticket.cluster, ticket.role, ticket.queues):
        return False
    own, shown = tokens.peek(there.login.jwt), tokens.peek(ticket.login.jwt)
    if own is None or shown is None:
        return there.login == ticket.login  # it is lent, or there is none
    return own.origin == shown.origin and (not own.exp or own.exp > time.time())


def _is_newer(ticket: Ticket, there: Identity) -> bool:
    """Whether the ticket was made after the last token: then somebody wants this machine to use it."""
    own, shown = tokens.peek(there.login.jwt), tokens.peek(ticket.login.jwt)
    return own is not None and shown is not None and shown.iat > own.iat


def _seed_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.key")


def _seed(path: Path, there: Identity | None) -> str:
    """The key that this machine asked with last, or that it has; else a new one."""
    file = _seed_file(path)
    if file.exists():
        return file.read_text()
    claims = tokens.peek(there.login.jwt) if there is not None else None
    if there is not None and claims is not None and claims.tagged("role"):
        return there.login.seed
    return _new_seed(path)


def _new_seed(path: Path) -> str:
    """A new key, on disk before anybody hears of it."""
    seed = keys.new_seed("user")
    write_private(_seed_file(path), seed.encode())
    return seed


async def _ask_to_enrol(ticket: Ticket, seed: str, name: str) -> EnrolReply:
    key = keys.public(seed)
    link = Link(ticket.login, f"enrol {ticket.id}")
    try:
        await link.open()
        proof = prove(seed, ticket.id)
        asked = _said(token=ticket.login.jwt, key=key, proof=proof, name=name, host=host_name())
        return await _ask(link, Layout(ticket.cluster).enrol(ticket.id), asked)
    except TicketRefused as refused:  # by the broker, or it is the wrong one
        if ticket.expires_at and ticket.expires_at <= wall_clock_ms():
            when = rfc3339(ticket.expires_at)
            raise TicketRefused(f"the ticket expired at {when}", hint=ANOTHER_TICKET) from refused
        raise
    finally:
        await link.close()


def _said(**what: Any) -> EnrolRequest:
    return EnrolRequest(protocol=PROTOCOL + OLDEST, version=__version__, wire=WIRE, **what)


def _read_answer(data: bytes) -> EnrolReply:
    """Raises VersionsDiffer where the cluster speaks at a level that this build does not understand."""
    theirs = "another version"
    try:
        numbered = _numbered.decode(data)
        theirs = numbered.version or theirs
        if is_understood(numbered.protocol - PROTOCOL):
            return _answers.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    raise VersionsDiffer(
        f"mvmci {__version__} here and {theirs} in the cluster do not understand each other",
        hint=HINT,
    )


async def _ask(link: Link, subject: str, ask: EnrolRequest) -> EnrolReply:
    """Ask until somebody answers, for `ASK_S`. Raises VersionsDiffer, StoreUnavailable."""
    until = time.monotonic() + ASK_S
    while True:
        try:
            answered = await link.call(subject, _encode(ask))
        except StoreUnavailable as nobody:
            if time.monotonic() > until:
                raise StoreUnavailable(
                    f"no control plane answers at {link.url}",
                    hint="see that one runs: `mvmci ps`, where the cluster was brought up",
                ) from nobody
            await asyncio.sleep(ASK_PAUSE_S)
            continue
        return _read_answer(answered)


# Keeping it.


def remember_address(link: Link, identity: Identity, path: Path) -> Identity:
    """`identity`, kept at `path`, with the address at which the broker answered as its first."""
    if link.login.urls == identity.login.urls:
        return identity
    login = msgspec.structs.replace(identity.login, urls=link.login.urls)
    found = msgspec.structs.replace(identity, login=login)
    write_identity(path, found)
    return found


def is_due(identity: Identity, now: float) -> bool:
    """Whether its token wants renewing: two thirds of its life are over."""
    claims = tokens.peek(identity.login.jwt)
    return claims is not None and claims.is_old(now)


async def renew(
    link: Link, identity: Identity, path: Path, certificate: Certificate | None = None
) -> Identity:
    """Ask for a newer token, and keep what comes at `path`. It is the same while that is good. An executor
    asks for its `certificate` as well.

    Raises TicketRefused, VersionsDiffer, StoreUnavailable.
    """
    subject = Layout(identity.cluster).renew(identity.unit)
    wanted = certificate.wanted() if certificate is not None else None
    said = _said(token=identity.login.jwt, host=host_name(), certificate=wanted)
    answer = await _ask(link, subject, said)
    if answer.refused:
        raise TicketRefused(answer.refused, hint=answer.hint or None)
    if certificate is not None and answer.certificate:
        certificate.keep(answer.certificate)
    elif wanted is not None:
        log.warning("no control plane signs a certificate: the HTTP API is not served with a new one")
    if not answer.jwt or answer.jwt == identity.login.jwt:
        return identity
    login = msgspec.structs.replace(identity.login, jwt=answer.jwt, urls=answer.urls or identity.login.urls)
    _check_origin(login, identity.login)
    renewed = msgspec.structs.replace(identity, login=login)
    write_identity(path, renewed)
    return renewed


async def renew_always(
    link: Link, identity: Identity, path: Path, certificate: Certificate | None = None
) -> None:
    """Let `link` never be without a good token, and keep the newest at `path`; the same of a `certificate`.

    A unit asks at once, as that also enters one of `up` in the registry, and connects again with what it
    gets, which may allow more. A client asks when it is due, and shows the newer token when the broker
    asks for it. Ends at once where the login is not ours. Raises TicketRefused, VersionsDiffer.
    """
    claims = tokens.peek(identity.login.jwt)
    if claims is None or not claims.tagged("role"):
        return
    identity, asked = remember_address(link, identity, path), identity.role == "client"
    while True:
        lacking = certificate is not None and certificate.wanted() is not None
        if not asked or lacking or is_due(identity, time.time()):
            try:
                renewed = await renew(link, identity, path, certificate)
            except StoreUnavailable as away:
                log.info("cannot renew the credential: %s; will retry", away.message)
                await asyncio.sleep(RENEW_PAUSE_S)
                continue
            asked = True
            if renewed != identity:
                identity = renewed
                if identity.role == "client":
                    link.login = identity.login
                else:
                    await link.renew(identity.login)
        await asyncio.sleep(RENEW_LOOK_S)
