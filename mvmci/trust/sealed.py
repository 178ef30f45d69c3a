"""What the containers of a rendered folder are given of a cluster's trust: files of `secrets/`, 0600.

    broker.json          `BrokerConfig`: what it is to be, and whom it believes
    broker.key .pem      its own key and certificate
    control-plane.json   `ControlPlaneConfig`: the keys of the cluster, and what is to be made known to it
    <role>.ticket        what a container of that role joins with, any number of times, for ever

They are made where the keys are, before any broker runs. A ticket is worth nothing until the cluster has
a record of it: control planes make the records, and leave one that is there as it is, so that a ticket
that was revoked stays so.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from mvmci.cluster.broker import BrokerSettings, Guard
from mvmci.cluster.identity import Login, Ticket, TicketRole, decode, encode
from mvmci.errors import StoreUnavailable, TicketRefused, Usage
from mvmci.store import ClusterSettings
from mvmci.trust import tokens
from mvmci.trust.authority import Authority
from mvmci.trust.registry import TicketRecord, change_ticket, record_of

if TYPE_CHECKING:
    from mvmci.stores.nats import Cluster

KNOWN_PAUSE_S = 0.5

log = logging.getLogger(__name__)


class BrokerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A broker. The paths are those inside of its container; the accounts' tokens hold no secret."""

    cluster: str
    settings: BrokerSettings
    operator: str
    signer: str
    system_account: str
    accounts: dict[str, str]
    certificate: str
    key: str

    def guard(self) -> Guard:
        """Whom it believes."""
        return Guard(
            operator=self.operator,
            signer=self.signer,
            system_account=self.system_account,
            accounts=self.accounts,
            certificate=Path(self.certificate),
            key=Path(self.key),
        )


class ControlPlaneConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A control plane. Secret. No `settings`: somebody else writes them."""

    cluster: str
    login: Login  # of nobody: where its broker is
    operator: str = ""
    account: str = ""
    system: str = ""
    external: Login | None = None
    tickets: dict[str, TicketRecord] = {}
    settings: ClusterSettings | None = None

    def authority(self) -> Authority:
        """What gives out credentials."""
        return Authority(
            cluster=self.cluster,
            folder=Path(),  # it has no files
            operator=self.operator,
            account=self.account,
            system=self.system,
            ca=self.login.ca,
            external=self.external,
        )


_T = TypeVar("_T", BrokerConfig, ControlPlaneConfig)


def read(path: Path, kind: type[_T]) -> _T:
    """What is in the file at `path`. Raises Usage."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not what `mvmci render` writes"
        raise Usage(f"{path} cannot be read: {why}", hint="`mvmci render` makes it anew") from None


# ---- Where the keys are


def for_broker(authority: Authority, settings: BrokerSettings, folder: str) -> BrokerConfig:
    """The file of a broker that finds its key and its certificate in `folder`."""
    guard = authority.guard()
    assert guard is not None, "a broker of the user's own is not ours to run"
    return BrokerConfig(
        cluster=authority.cluster,
        settings=settings,
        operator=guard.operator,
        signer=guard.signer,
        system_account=guard.system_account,
        accounts=dict(guard.accounts),
        certificate=f"{folder}/{guard.certificate.name}",
        key=f"{folder}/{guard.key.name}",
    )


def for_plane(
    authority: Authority, login: Login, tickets: Mapping[str, TicketRecord], settings: ClusterSettings | None
) -> ControlPlaneConfig:
    """The file of a control plane, whose broker is where `login` says."""
    return ControlPlaneConfig(
        cluster=authority.cluster,
        login=login,
        operator=authority.operator,
        account=authority.account,
        system=authority.system,
        external=authority.external,
        tickets=dict(tickets),
        settings=settings,
    )


def ticket_for(
    authority: Authority, role: TicketRole, queues: Sequence[str], login: Login, there: str
) -> tuple[str, TicketRecord]:
    """A ticket for any number of uses, for ever, and its record: the one that is `there`, if it fits."""
    ticket = _fitting(authority, role, tuple(queues), login, there)
    ticket = ticket or authority.ticket(role, queues, login, None)
    claims = tokens.peek(ticket.login.jwt)
    since = claims.iat * 1000 if claims is not None and authority.external is None else 0
    return encode(ticket), msgspec.structs.replace(record_of(authority, ticket, uses=0), since=since)


def _fitting(
    authority: Authority, role: TicketRole, queues: tuple[str, ...], login: Login, there: str
) -> Ticket | None:
    try:
        ticket = decode(there)
    except TicketRefused:
        return None
    if (ticket.cluster, ticket.role, ticket.queues) != (authority.cluster, role, queues):
        return None
    if authority.external is not None:
        return ticket if ticket.login == authority.external else None
    ours = tokens.read(ticket.login.jwt, authority.issuer) is not None
    return ticket if ours and (ticket.login.urls, ticket.login.ca) == (login.urls, login.ca) else None


# ---- In the control plane


async def make_known(cluster: Cluster, plane: ControlPlaneConfig) -> None:
    """Write what the cluster is, and which tickets there are. Waits for a broker, and for whoever makes
    the streams, if that is not us. Raises TicketRefused, Usage.
    """
    while True:
        try:
            if plane.settings is not None:
                await _make(cluster, plane.settings)
            for ticket, record in plane.tickets.items():
                await change_ticket(cluster.config, ticket, functools.partial(_first, record))
            return
        except StoreUnavailable as away:
            log.info("tickets are not known yet: %s", away.message)
        await asyncio.sleep(KNOWN_PAUSE_S)


def _first(new: TicketRecord, there: TicketRecord | None) -> TicketRecord | None:
    """What stands there stays: it says who used the ticket, and whether it was revoked."""
    return new if there is None else None


async def _make(cluster: Cluster, settings: ClusterSettings) -> None:
    """The streams, and what the cluster is and allows. Again is free."""
    from mvmci.stores.nats import maintain

    await maintain(cluster.link, cluster.layout, settings.store_bytes, settings.logs_ms, settings.queues)
    there, data = await cluster.config.get("settings"), msgspec.json.encode(settings)
    if there is None or there.value != data:
        await cluster.config.put("settings", data)
