"""The control plane's side of enrolment: who comes with a ticket, and whose token is about to expire.

Every decision is a compare-and-set in the registry, so several control planes may decide at once, and
one that is killed in the middle leaves nothing that asking again would not mend. A ticket is noted as
used by a key before a unit is entered, so the same key asking again uses nothing up.

A name belongs to one key. One that was asked for is given or refused; one that comes from a host's name
gets a number when it is taken.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from mvmci import __version__
from mvmci.cluster.identity import TICKET_ROLES, TicketRole, UnitRole
from mvmci.errors import StoreUnavailable, TicketRefused
from mvmci.jobs.job import is_id
from mvmci.jobs.summary import rfc3339
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.link import Link, Unsubscribe
from mvmci.system import keys
from mvmci.system.tasks import cancel
from mvmci.trust import tokens
from mvmci.trust.authority import as_unit
from mvmci.trust.certificate import Certifier
from mvmci.trust.enrol.client import (
    ANOTHER_TICKET,
    PROTOCOL,
    Because,
    EnrolReply,
    EnrolRequest,
    is_proven,
)
from mvmci.trust.permissions import SERVICE_ANSWERS
from mvmci.trust.registry import (
    AccountTokens,
    TicketRecord,
    UnitRecord,
    change_ticket,
    change_unit,
    read_units,
)
from mvmci.trust.signer import Signer, life_s

_GROUP = "control-plane"
NAMES_MAX = 1_000  # units of one host's name
BELIEVED_PAUSE_S = 0.5
PROBE_S = 60
ONE_VERSION = "use one version of mvmci on both machines"

log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
_asks = msgspec.json.Decoder(EnrolRequest)


class _Refused(Exception):
    """What the control plane says no to."""

    def __init__(self, sentence: str, *, hint: str = ANOTHER_TICKET, because: Because = "") -> None:
        super().__init__(sentence)
        self.answer = _answer(refused=sentence, hint=hint, because=because)


class _Taken(_Refused):
    """A name that belongs to another machine, or to a unit of `up`."""

    def __init__(self, name: str, hint: str = "choose another one with --name") -> None:
        super().__init__(f"the name {name} is taken", hint=hint, because="name")


class EnrolmentServer:
    """Answers machines that come with a ticket, and units that renew.

    `urls` are where joiners are to dial; where they came from, if there are none. Without a `certifier`,
    executors get no certificates.
    """

    def __init__(
        self,
        cluster: Cluster,
        signer: Signer,
        trusted: AccountTokens,
        *,
        certifier: Certifier | None = None,
        urls: Sequence[str] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._config = cluster.config
        self._signer = signer
        self._trusted = trusted
        self._certifier = certifier
        self._urls = tuple(urls)
        self._now = now
        self._unsubscribe: list[Unsubscribe] = []
        self._waiting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Answer from now on, or as soon as the broker believes what we sign. Raises StoreUnavailable."""
        if self._signer.external or await self._is_believed():
            await self._serve()
        else:
            log.info("the broker does not believe what this control plane signs: nobody can enrol yet")
            self._waiting = asyncio.create_task(self._until_believed(), name="enrol")

    async def close(self) -> None:
        """Answer no more."""
        await cancel(self._waiting)
        for unsubscribe in self._unsubscribe:
            await unsubscribe()

    async def _serve(self) -> None:
        link, layout = self._cluster.link, self._cluster.layout
        self._unsubscribe.append(await link.serve(layout.enrol("*"), self._enrol, self._is_asker, _GROUP))
        self._unsubscribe.append(await link.serve(layout.renew("*"), self._renew, self._is_asker, _GROUP))

    async def _until_believed(self) -> None:
        """Whoever has the cluster's keys tells the broker of ours, and may do so after we have begun."""
        while True:
            await asyncio.sleep(BELIEVED_PAUSE_S)
            with suppress(StoreUnavailable):
                if await self._is_believed():
                    await self._serve()
                    return

    async def _is_believed(self) -> bool:
        """Whether the broker lets in who has a token of ours: else who enrols would be refused, for good."""
        seed, unit, base = keys.new_seed("user"), f"probe-{secrets.token_hex(4)}", self._cluster.link.login
        jwt = self._signer.mint(keys.public(seed), unit, "client", (), PROBE_S)
        link = Link(as_unit(base, self._signer.cluster, "client", unit, jwt=jwt, seed=seed), unit)
        try:
            await link.open()
        except TicketRefused:
            return False
        finally:
            await link.close()
        return True

    def _is_asker(self, subject: str, reply: str) -> bool:
        """Whether `reply` is an inbox of who asks on `subject`: of its own, or what the broker calls it.

        On a broker of the user's own all have one credential, and inboxes say no names.
        """
        of, _, name = (*reply.split("."), "", "")[:3]
        own = self._signer.external or name == subject.rpartition(".")[2]
        return of == SERVICE_ANSWERS or (of == "_INBOX" and own)

    async def _enrol(self, subject: str, data: bytes) -> bytes:
        ticket = subject.rpartition(".")[2]
        return await self._answered(data, lambda ask: self._take_in(ticket, ask))

    async def _renew(self, subject: str, data: bytes) -> bytes:
        unit = subject.rpartition(".")[2]
        return await self._answered(data, lambda ask: self._renewed(unit, ask))

    async def _answered(self, data: bytes, decide: Callable[[EnrolRequest], Awaitable[EnrolReply]]) -> bytes:
        level = self._cluster.store.level.spoken
        try:
            ask = _asks.decode(data)
            oldest = ask.protocol - PROTOCOL
            if not 0 <= oldest <= level <= max(oldest, ask.wire):
                raise _Refused("the versions differ")  # the answer's own number says so
            answer = await decide(ask)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            answer = _answer(refused="the request cannot be read")
        except _Refused as refused:
            answer = refused.answer
        return _encode(msgspec.structs.replace(answer, protocol=PROTOCOL + level))

    # Taking in.

    async def _take_in(self, ticket: str, ask: EnrolRequest) -> EnrolReply:
        if not keys.is_public_key(ask.key, "user"):
            raise _Refused("the request has no key")
        meant = self._meant(ticket, ask)
        if not is_proven(ask.key, ticket, ask.proof):  # else it could enter another unit's as its own
            raise _Refused("the request does not show that it has its key", hint=ONE_VERSION)
        own = await self._check(ask)
        record = await self._use(ticket, ask)
        role, queues = meant or (msgspec.convert(record.role, TicketRole), record.queues)
        since = int(self._now()) * 1000
        unit = UnitRecord(
            key=ask.key,
            role=role,
            queues=queues,
            ticket=ticket,
            host=ask.host[:63],
            since=since,
            wire=ask.wire,
        )
        name = await self._register([ask.name] if ask.name else [*own, *_names(ask.host)], unit)
        jwt = self._signer.mint(ask.key, name, role, queues, life_s(role))
        log.info("%s has enrolled as %s with ticket %s", name, role, ticket)
        return _answer(unit=name, role=role, queues=queues, jwt=jwt, urls=self._urls)

    async def _check(self, ask: EnrolRequest) -> list[str]:
        """The names that this key has. Nothing of the ticket is used for what can be refused before."""
        units = await read_units(self._config)
        own = [name for name, unit in units.items() if unit.key == ask.key]
        for name in own:
            if units[name].revoked:
                raise _Refused(f"{name} was revoked", because="key")
        if ask.name:
            if not is_id(ask.name):
                raise _Refused(
                    "that is not a valid name",
                    hint="choose another one",
                    because="name",
                )
            wanted = UnitRecord(key=ask.key, role="worker")
            self._claim(ask.name, wanted, await self._present(), units.get(ask.name))
        return own

    async def _use(self, ticket: str, ask: EnrolRequest) -> TicketRecord:
        """Note that a key uses the ticket, once; what is known of the ticket."""

        def use(record: TicketRecord | None) -> TicketRecord | None:
            if record is None:
                raise _Refused("the cluster does not know this ticket")
            if record.revoked:
                raise _Refused("the ticket was revoked")
            if record.expires_at and record.expires_at <= self._now() * 1000:
                raise _Refused(f"the ticket expired at {rfc3339(record.expires_at)}")
            if ask.key in record.used_by:
                return None
            if record.uses and len(record.used_by) >= record.uses:
                raise _Refused("the ticket has been used up")
            return msgspec.structs.replace(record, used_by=(*record.used_by, ask.key))

        record = await change_ticket(self._config, ticket, use)
        assert record is not None
        return record

    def _meant(self, ticket: str, ask: EnrolRequest) -> tuple[TicketRole, tuple[str, ...]] | None:
        """The role and queues in the ticket's token, which we signed; None where a login is lent."""
        if self._signer.external:
            return None
        claims = tokens.read_token(ask.token, self._signer.issuer)
        role = claims.tagged("enrol") if claims is not None else ""
        if claims is None or claims.name != ticket or role not in TICKET_ROLES:
            raise _Refused("the request does not show its ticket")
        return msgspec.convert(role, TicketRole), claims.queues

    async def _register(self, names: Sequence[str], unit: UnitRecord) -> str:
        """Enter `unit` under the first of `names` that is free."""
        present = await self._present()
        for name in names:
            try:
                await change_unit(self._config, name, functools.partial(self._claim, name, unit, present))
            except _Taken:
                continue
            return name
        raise _Taken(names[0])

    def _claim(self, name: str, unit: UnitRecord, present: set[str], there: UnitRecord | None) -> UnitRecord:
        """`unit`, if it may have the name. That of a unit of `up` is free at no time: `up` would start it
        again and again beside the one that took it."""
        if there is not None and there.key != unit.key and there.revoked and not there.ticket:
            raise _Taken(name, hint=f"`mvmci up` brings {name} back; choose another one with --name")
        if name in present if there is None else there.key != unit.key and not there.revoked:
            raise _Taken(name)
        return unit

    async def _present(self) -> set[str]:
        """Who is there: a unit of `up` may have yet to say that it has a key."""
        return {member.unit for member in await self._cluster.store.presence.members()}

    # Renewing.

    async def _renewed(self, name: str, ask: EnrolRequest) -> EnrolReply:
        """A newer token for a unit that shows its own, or that one while it is good."""
        if self._signer.external:
            return _answer(unit=name)
        claims = await self._shown(ask.token)
        shown = claims.tagged("role") if claims is not None else ""
        if claims is None or claims.name != name or not shown:
            raise _Refused(f"the request does not show a token of {name}")
        role = msgspec.convert(shown, UnitRole)
        unit = UnitRecord(
            key=claims.sub,
            role=role,
            queues=claims.queues,
            host=ask.host[:63],
            since=claims.iat * 1000,
            wire=ask.wire,
        )
        await change_unit(self._config, name, lambda there: _enter(name, there, unit))
        jwt = ask.token
        if self._signer.signs_for(role) and self._signer.is_due(claims, role):
            jwt = self._signer.mint(unit.key, name, role, unit.queues, life_s(role))
        certificate = ""
        if role == "executor" and ask.certificate is not None and self._certifier is not None:
            certificate = self._certifier.certificate(ask.certificate, self._now())
        return _answer(
            unit=name, role=role, queues=unit.queues, jwt=jwt, urls=self._urls, certificate=certificate
        )

    async def _shown(self, token: str) -> tokens.Claims | None:
        """What a unit's token says, if it is one of this cluster: control planes sign for who may enrol."""
        claims = tokens.read_token(token, self._signer.issuer)
        signed = tokens.peek(token) if claims is None else None
        if signed is None or signed.tagged("role") not in TICKET_ROLES:
            return claims
        known = signed.iss in await self._trusted.signers(self._config)
        return tokens.read_token(token, signed.iss) if known else None


def _enter(name: str, there: UnitRecord | None, unit: UnitRecord) -> UnitRecord | None:
    """What the registry is to say of a unit that shows a token. None: what it says already.

    A token that is newer than the record was made by `up`, which may give a name of its own another key.
    """
    if there is None:
        return unit
    if there.key == unit.key:
        if there.revoked:
            raise _Refused(f"{name} was revoked")
        if (there.role, there.queues) == (unit.role, unit.queues):
            return None if there.wire == unit.wire else msgspec.structs.replace(there, wire=unit.wire)
        unit = msgspec.structs.replace(unit, ticket=there.ticket)
    elif there.ticket and not there.revoked:
        raise _Refused(
            f"the name {name} belongs to a machine that came with ticket {there.ticket}",
            hint=f"`mvmci revoke {name}` frees it",
        )
    if unit.since < there.since:
        raise _Refused(f"{name} has a newer token than this one", hint="`mvmci up` makes another")
    return unit


def _answer(**what: Any) -> EnrolReply:
    return EnrolReply(protocol=PROTOCOL, version=__version__, **what)


def _names(host: str) -> Iterator[str]:
    """Names for a unit of `host`."""
    base = host if re.fullmatch(r"[a-z0-9][a-z0-9-]{0,54}", host) else "host"
    yield base
    yield from (f"{base}-{number}" for number in range(2, NAMES_MAX))
