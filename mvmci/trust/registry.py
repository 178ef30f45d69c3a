"""The registry: which tickets were made and which units there are, and what takes them away again.

`ticket.<id>` and `unit.<name>` in CONFIG, written by compare-and-set. They say who is known and who was
revoked; what somebody may do stands in tokens alone, which nobody else can write.

Revoking writes the record first, so that nothing is renewed any more, then the ledger, and then tells the
broker, which cuts that key's connections at once and keeps it out over every restart. A revoked key stays so
for good; the name that it had is free.

nats-server takes any token of an account that is well signed, and neither looks whether it is older than the
one that it has, nor, before it keeps it on its disk, who signed it. So nobody has a credential for that but
who has the cluster's keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from mvmci.cluster.identity import Login, Ticket, TicketRole
from mvmci.errors import Conflict, NotFound, StoreUnavailable
from mvmci.stores.nats.config import Config, Setting
from mvmci.stores.nats.link import Link
from mvmci.system import keys
from mvmci.system.clock import wall_clock_ms
from mvmci.trust import tokens
from mvmci.trust.accounts import ACCOUNTS, ENROLS, Account
from mvmci.trust.authority import Authority
from mvmci.trust.permissions import CLAIMS_LOOKUP, CLAIMS_UPDATE

_TRIES_MAX = 20  # of a compare-and-set


class TicketRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A ticket that was made. `key` is that of its bootstrap credential; times are ms since 1970."""

    role: str
    queues: tuple[str, ...] = ()
    expires_at: int = 0
    uses: int = 1  # 0 is any number
    used_by: tuple[str, ...] = ()  # public keys
    key: str = ""
    since: int = 0
    revoked: int = 0  # when


class UnitRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A unit that enrolled. `ticket` is empty for one that `up` started.

    `wire` is the newest level that it understood when it was last there.
    """

    key: str
    role: str
    queues: tuple[str, ...] = ()
    ticket: str = ""
    host: str = ""
    since: int = 0
    revoked: int = 0
    wire: int = 0


_T = TypeVar("_T", TicketRecord, UnitRecord)
_records = msgspec.json.Decoder(TicketRecord)
_units = msgspec.json.Decoder(UnitRecord)
_encode = msgspec.json.Encoder().encode


async def change_ticket(
    config: Config, ticket: str, step: Callable[[TicketRecord | None], TicketRecord | None]
) -> TicketRecord | None:
    """Write what `step` makes of a ticket's record; None leaves it. What stands there afterwards.

    `step` is called again when somebody else wrote meanwhile, and may raise. Raises StoreUnavailable.
    """
    return await _change(config, f"ticket.{ticket}", _records, step)


async def change_unit(
    config: Config, name: str, step: Callable[[UnitRecord | None], UnitRecord | None]
) -> UnitRecord | None:
    """The same for a unit."""
    return await _change(config, f"unit.{name}", _units, step)


async def _change(
    config: Config, key: str, decoder: msgspec.json.Decoder[_T], step: Callable[[_T | None], _T | None]
) -> _T | None:
    for _ in range(_TRIES_MAX):
        setting = await config.get(key)
        there = _read(decoder, setting)
        changed = step(there)
        if changed is None:
            return there
        try:
            await config.put(key, _encode(changed), expect=setting.revision if setting is not None else 0)
        except Conflict:
            continue
        return changed
    raise StoreUnavailable(f"too many change {key} at the same time", hint="try again")


async def read_tickets(config: Config) -> dict[str, TicketRecord]:
    """The tickets that were made, by id. Raises StoreUnavailable."""
    return _read_all(_records, await config.all("ticket"))


async def read_units(config: Config) -> dict[str, UnitRecord]:
    """The units that enrolled, by name. Raises StoreUnavailable."""
    return _read_all(_units, await config.all("unit"))


def _read(decoder: msgspec.json.Decoder[_T], setting: Setting | None) -> _T | None:
    """What a key holds; None where that is nothing, or nothing that we wrote."""
    try:
        return decoder.decode(setting.value) if setting is not None else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _read_all(decoder: msgspec.json.Decoder[_T], values: dict[str, bytes]) -> dict[str, _T]:
    found = {}
    for key, value in values.items():
        read = _read(decoder, Setting(value, 0))
        if read is not None:
            found[key.partition(".")[2]] = read
    return found


async def make_ticket(
    config: Config,
    authority: Authority,
    base: Login,
    *,
    role: TicketRole,
    queues: Sequence[str] = (),
    uses: int = 1,
    ttl_s: float,
) -> Ticket:
    """A ticket that the cluster knows. `base` is how other machines reach the broker; 0 uses: any number.

    Raises StoreUnavailable.
    """
    ticket = authority.ticket(role, queues, base, ttl_s)
    record = record_of(authority, ticket, uses)
    await config.put(f"ticket.{ticket.id}", _encode(record), expect=0)
    return ticket


def record_of(authority: Authority, ticket: Ticket, uses: int) -> TicketRecord:
    """What the cluster is to know of a ticket that was just made."""
    return TicketRecord(
        role=ticket.role,
        queues=ticket.queues,
        expires_at=ticket.expires_at,
        uses=uses,
        key=keys.public(ticket.login.seed) if authority.external is None else "",
        since=int(authority.now() * 1000),
    )


def state_of(record: TicketRecord) -> str:
    """Whether a ticket can be used now, "open", and if not, why."""
    if record.revoked:
        return "revoked"
    if record.expires_at and record.expires_at <= wall_clock_ms():
        return "expired"
    return "used" if record.uses and len(record.used_by) >= record.uses else "open"


@dataclass(frozen=True, kw_only=True)
class AccountTokens:
    """The tokens of the accounts, which only the operator signs: those that a unit was `given`, or newer ones
    in CONFIG. `operator` is his public key."""

    operator: str
    given: Mapping[Account, str] = field(default_factory=dict)

    async def signers(self, config: Config) -> frozenset[str]:
        """Who signs for those who enrol. Raises StoreUnavailable."""
        setting = await config.get(f"account.{ENROLS[0]}")
        there = setting.value.decode(errors="replace") if setting is not None else ""
        read = [tokens.read_token(text, self.operator) for text in (there, self.given.get(ENROLS[0], ""))]
        newest = max((one for one in read if one is not None), key=lambda one: one.iat, default=None)
        return newest.signers if newest is not None else frozenset()


async def revoke_ticket(config: Config, authority: Authority, base: Login, ticket: str) -> None:
    """Let nobody enrol with a ticket any more; who did stays. Raises NotFound, StoreUnavailable."""

    def revoke(record: TicketRecord | None) -> TicketRecord:
        if record is None:
            raise NotFound(f"there is no ticket {ticket[:80]}", hint="`mvmci ticket ls` lists them")
        return msgspec.structs.replace(record, revoked=record.revoked or wall_clock_ms())

    record = await change_ticket(config, ticket, revoke)
    if authority.external is None and record is not None and record.key:
        authority.ledger.revoke("tickets", record.key)
        await push_accounts(config, authority, base)


async def revoke_units(config: Config, authority: Authority, base: Login, names: Sequence[str]) -> None:
    """Cut units off, for good, in one go: those that have a record, and control planes. One that signs, signs
    no more, and who has a token of it only is cut off too.

    Raises NotFound where there is none of a name, StoreUnavailable, Usage where the broker is not ours.
    """
    authority.system_login(base)
    planes = authority.ledger.planes()

    def revoke(name: str, unit: UnitRecord | None) -> UnitRecord | None:
        if unit is None and name not in planes:
            raise NotFound(f"there is no unit {name[:80]}", hint="`mvmci ps` lists them")
        return msgspec.structs.replace(unit, revoked=unit.revoked or wall_clock_ms()) if unit else None

    for name in names:
        record = await change_unit(config, name, functools.partial(revoke, name))
        if record is not None:
            own = [account for role, account in ACCOUNTS.items() if role == record.role]
            for account in own or ENROLS:  # a role of a newer version is one of those who enrol
                authority.ledger.revoke(account, record.key)
        if name in planes:
            authority.ledger.revoke("main", planes[name].key)
            authority.ledger.revoke("signers", planes[name].signer)
    await push_accounts(config, authority, base)


async def push_accounts(config: Config, authority: Authority, base: Login) -> None:
    """Let the broker know what the accounts are: who signs in them, what each shares by this version, and
    every revoked key, in addition to those that it knows. CONFIG then has their tokens, for all to read.

    It replaces one token by another, and may so undo what another push did in between: whoever wrote one
    reads the records again, and looks whether all are in it. Raises StoreUnavailable.
    """
    link = Link(authority.system_login(base), "revoke")
    await link.open()
    try:
        for account in dict.fromkeys(ACCOUNTS.values()):
            if account != "system":
                token = await _push(config, authority, link, account)
                there = await config.get(f"account.{account}")
                if there is None or there.value != token.encode():
                    await config.put(f"account.{account}", token.encode())
    finally:
        await link.close()


async def _push(config: Config, authority: Authority, link: Link, account: Account) -> str:
    """Let the broker know of an account. The token that it has of it afterwards."""
    for _ in range(_TRIES_MAX):
        authority.ledger.revoke(account, *await _revoked(config, account))
        token = (await link.call(CLAIMS_LOOKUP.format(authority.accounts[account]))).decode()
        there = tokens.read_token(token, keys.public(authority.operator))
        known, since = (there.revoked, there.iat) if there is not None else (frozenset[str](), 0)
        newer = authority.account_token(account, known, after=since)
        wanted = tokens.peek(newer)
        assert wanted is not None, "it was just made"
        if there is not None and there.says(wanted):
            return token
        told = msgspec.json.decode(await link.call(CLAIMS_UPDATE, newer.encode()), type=dict[str, Any])
        if "error" in told:
            raise StoreUnavailable(f"the broker does not take the account of {account}: {told['error']}")
    raise StoreUnavailable("others revoke at the same time", hint="try again")


async def _revoked(config: Config, account: Account) -> frozenset[str]:
    """The keys that were revoked there."""
    if account == "tickets":
        records: list[TicketRecord | UnitRecord] = [*(await read_tickets(config)).values()]
    else:
        units = await read_units(config)
        roles = {role for role, of in ACCOUNTS.items() if of == account}
        records = [unit for unit in units.values() if unit.role in roles]
    return frozenset(record.key for record in records if record.revoked and record.key)
