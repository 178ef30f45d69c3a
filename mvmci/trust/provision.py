"""What units are given of a cluster's trust: one file for each, 0600, which `--config` names.

    broker           `BrokerConfig`: what it is to be, and whom it believes
    control-plane    `ControlPlaneConfig`: a key that signs for who enrols, and what is to be made known
    worker executor  `MemberConfig`: who it is, and where it dials
    balancer         `BalancerConfig`: how it shows who it is over a network; on the loopback nothing

They are made where the keys are, before any broker runs, for the same meaning (`UnitConfig`) on any
runtime. What a unit changes of it, such as a token that it renewed, it keeps in a file of its own.

A key that is made on the unit's own host stays there:

    there      new_key(role)            the secret half, which never leaves that host
    there      public_of(role, key)     what is sent of it
    here       make_config(..., public) the file without its secret half
    there      with_seed(file, key)     the file of the unit

The containers of a service that people scale share their files, and so cannot be given one identity each:
they come with a ticket for any number of uses, for ever. A ticket is worth nothing until the cluster has
a record of it: control planes make the records, and leave one that is there as it is, so that a ticket
that was revoked stays so.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from mvmci.cluster.broker import BrokerSettings, Guard
from mvmci.cluster.deployment import RoleName, UnitConfig, queues_of
from mvmci.cluster.identity import (
    ENGINE_TLS_NAME,
    Identity,
    Login,
    Ticket,
    TicketRole,
    decode_ticket,
    encode_ticket,
)
from mvmci.errors import StoreUnavailable, TicketRefused, Usage, VersionsDiffer
from mvmci.store import ClusterSettings
from mvmci.system import keys
from mvmci.system.ports import is_loopback
from mvmci.trust import tokens
from mvmci.trust.accounts import ACCOUNTS, Account
from mvmci.trust.authority import CERTIFICATE, KEY, Authority, as_unit, read_identity, write_identity
from mvmci.trust.certificate import Certifier, run_token
from mvmci.trust.ledger import Plane
from mvmci.trust.registry import AccountTokens, TicketRecord, change_ticket, record_of
from mvmci.trust.signer import Signer, life_s

if TYPE_CHECKING:
    from mvmci.stores.nats import Cluster

KNOWN_PAUSE_S = 0.5
DIGEST_DIGITS = 16

log = logging.getLogger(__name__)


class BrokerConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A broker. The paths are those that it sees; the accounts' tokens hold no secret. `tls` and `seed` are
    its certificate and its key in PEM where these come with this file, which is a secret then."""

    cluster: str
    settings: BrokerSettings
    operator: str
    signer: str
    system_account: str
    accounts: dict[str, str]
    certificate: str = ""
    key: str = ""
    tls: str = ""
    seed: str = ""

    def guard(self, folder: Path) -> Guard:
        """Whom it believes. What comes with this file is to lie in `folder`."""
        certificate, key = Path(self.certificate), Path(self.key)
        if self.tls:
            certificate, key = folder / "tls.pem", folder / "tls.key"
        return Guard(
            operator=self.operator,
            signer=self.signer,
            system_account=self.system_account,
            accounts=self.accounts,
            certificate=certificate,
            key=key,
            files={str(key): self.seed, str(certificate): self.tls} if self.tls else {},
        )


class ControlPlaneConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A control plane. Secret: from `seed` follows the key with which it signs. No `settings`: somebody else
    writes them.

    A file of the version before has the seeds of the cluster's keys instead of a `token`.
    """

    cluster: str
    unit: str
    seed: str = ""  # of its own key
    token: str = ""  # for that key
    login: Login  # of nobody: where its broker is
    generation: int = 0
    operator_key: str = ""  # public: who signs the accounts
    accounts: dict[Account, str] = {}  # their tokens; empty where the broker is not ours
    tls: str = ""  # the certificate, in PEM, by which it signs those of executors
    external: Login | None = None
    tickets: dict[str, TicketRecord] = {}
    settings: ClusterSettings | None = None
    operator: str = ""
    account: str = ""
    system: str = ""

    @property
    def _before(self) -> Authority | None:
        """What a file of the version before makes of it."""
        if self.token or self.external is not None:
            return None
        return Authority(
            cluster=self.cluster,
            folder=Path(),  # it has no files
            operator=self.operator,
            account=self.account,
            system=self.system,
            ca=self.login.ca,
        )

    def signer(self) -> Signer:
        """What mints the tokens of who enrols."""
        if self._before is not None:
            return self._before.signer
        read = {
            account: tokens.read_token(token, self.operator_key) for account, token in self.accounts.items()
        }
        publics = {account: claims.sub for account, claims in read.items() if claims is not None}
        return Signer(cluster=self.cluster, accounts=publics, seed=signing_seed(self.seed))

    def certifier(self) -> Certifier | None:
        """What signs the certificates of executors."""
        return Certifier(key=_tls_key(self.seed), ca=self.tls) if self.tls else None

    def trusted(self) -> AccountTokens:
        """Whose tokens it believes."""
        if self._before is not None:
            return AccountTokens(operator=keys.public(self.operator))
        return AccountTokens(operator=self.operator_key, given=self.accounts)

    def identity(self, path: Path) -> Identity:
        """Who it is, kept at `path`."""
        there = read_identity(path)
        if self._before is not None:
            if there is not None and there.login.seed != self.seed:
                there = None
            made = self._before.renewed(there, self.unit, "control-plane", (), self.login, seed=self.seed)
        else:
            login = self.external or as_unit(
                self.login, self.cluster, "control-plane", self.unit, jwt=self.token, seed=self.seed
            )
            made = Identity(cluster=self.cluster, unit=self.unit, role="control-plane", login=login)
        if made != there:
            write_identity(path, made)
        return made


class MemberConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker or an executor. Secret. `token` is what an executor asks for over HTTP, and a worker shows."""

    identity: Identity
    token: str = ""
    generation: int = 0

    def settled(self, path: Path) -> Identity:
        """Who it is, kept at `path`: it may have renewed its token there since it was given this file."""
        there = read_identity(path)
        if there is not None and _without_token(there) == _without_token(self.identity):
            own, given = (tokens.peek(one.login.jwt) for one in (there, self.identity))
            if own is None or given is None or own.exp >= given.exp:
                return there
        write_identity(path, self.identity)
        return self.identity


class BalancerConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A balancer that others reach over a network. Secret. All in PEM: the CA by which it knows executors,
    the certificate that it shows, and `seed`, the key for that."""

    ca: str
    tls: str
    seed: str = ""


def _without_token(identity: Identity) -> Identity:
    return msgspec.structs.replace(identity, login=msgspec.structs.replace(identity.login, jwt=""))


_T = TypeVar("_T", BrokerConfig, ControlPlaneConfig, MemberConfig, BalancerConfig)


def read_config(path: Path, kind: type[_T]) -> _T:
    """What is in the file at `path`. Raises Usage."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not what `mvmci up` or `render` writes"
        raise Usage(f"{path} cannot be read: {why}", hint="the same verb makes it anew") from None


# ---- Where the keys are


def in_making_order(units: Sequence[UnitConfig]) -> list[UnitConfig]:
    """`units` so that the files of those who sign are made first: the others' say who signs."""
    return sorted(units, key=lambda config: config.unit.role != "control-plane")


def trust_of(who: Authority | Login) -> str:
    """A digest of whom units believe, for `UnitConfig.trust`: the keys of the cluster, or the one login to a
    broker of the user's own. It tells no secret."""
    if isinstance(who, Authority):
        public = (who.issuer, who.ca)
    else:
        public = (who.jwt, who.seed and keys.public(who.seed))
    return hashlib.sha256(msgspec.json.encode(public)).hexdigest()[:DIGEST_DIGITS]


def make_config(
    config: UnitConfig,
    authority: Authority,
    there: bytes,
    *,
    keys_in: Path,
    tickets: Mapping[str, TicketRecord] = {},
    settings: ClusterSettings | None = None,
    public: str = "",
    names: Sequence[str] = (),
    addresses: Sequence[str] = (),
) -> bytes | None:
    """The file of a unit, which finds keys of the cluster in `keys_in`; None for one that needs none.

    It is the one that is `there` where that still says the same: a unit keeps its key over all changes
    but that of its generation. With `public`, what `public_of` says of a key on the unit's host, the key is
    that one, and its secret half is filled in there; `there` has none either. `names` and IP `addresses`
    are those of that host, for a certificate. Raises keys.BadKey, ValueError for what is none of these.
    """
    login = authority.login(config.dial, tls=any(url.startswith("tls://") for url in config.dial))
    unit = config.unit
    if config.broker is not None:
        was_broker = _decoded(there, BrokerConfig)
        made = _for_broker(authority, config.broker, was_broker)
        if public:
            old = was_broker.tls if was_broker is not None else ""
            tls = authority.sign_certificate(public, names, addresses, there=old)
            made = msgspec.structs.replace(made, tls=tls)
        else:
            made = msgspec.structs.replace(
                made, certificate=str(keys_in / CERTIFICATE), key=str(keys_in / KEY)
            )
        return msgspec.json.encode(made)
    if unit.role == "control-plane":
        was = _of_generation(_decoded(there, ControlPlaneConfig), config)
        return msgspec.json.encode(_for_plane(authority, config, was, login, public, tickets, settings))
    if unit.role == "worker" or unit.role == "executor":
        if public and not keys.is_public_key(public, "user"):
            raise keys.BadKey("this is no key of a unit")
        member = _of_generation(_decoded(there, MemberConfig), config)
        identity = authority.renewed(
            member.identity if member is not None else None,
            unit.name,
            unit.role,
            queues_of(unit),
            login,
            public=public,
        )
        token = authority.token
        token = run_token(token) if token and unit.role == "worker" else token
        made_member = MemberConfig(identity=identity, token=token, generation=config.generation)
        return msgspec.json.encode(made_member)
    outside = unit.listen is not None and not is_loopback(unit.listen.rpartition(":")[0].strip("[]"))
    if unit.role == "balancer" and authority.external is None and outside:
        was_front = _decoded(there, BalancerConfig)
        key = "" if public else was_front.seed if was_front is not None else keys.new_tls_key()
        tls = authority.sign_certificate(
            public or keys.public_tls_key(key),
            names,
            addresses,
            of=ENGINE_TLS_NAME,
            there=was_front.tls if was_front is not None else "",
        )
        return msgspec.json.encode(BalancerConfig(ca=authority.ca, tls=tls, seed=key))
    return None


def _decoded(data: bytes, kind: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _of_generation(there: Any, config: UnitConfig) -> Any:
    """The file that is there, if its key is still the one to use."""
    return there if there is not None and there.generation == config.generation else None


def _for_broker(authority: Authority, settings: BrokerSettings, there: BrokerConfig | None) -> BrokerConfig:
    """All but its key and its certificate."""
    guard = authority.guard()
    assert guard is not None, "a broker of the user's own is not ours to run"
    made = BrokerConfig(
        cluster=authority.cluster,
        settings=settings,
        operator=guard.operator,
        signer=guard.signer,
        system_account=guard.system_account,
        accounts=dict(guard.accounts),
    )
    if there is not None and (there.signer, there.system_account) == (made.signer, made.system_account):
        same = {
            name: there.accounts[name] for name in made.accounts if _same(made.accounts, there.accounts, name)
        }
        made = msgspec.structs.replace(made, operator=there.operator, accounts=made.accounts | same)
    return made


def _for_plane(
    authority: Authority,
    config: UnitConfig,
    there: ControlPlaneConfig | None,
    login: Login,
    public: str,
    tickets: Mapping[str, TicketRecord],
    settings: ClusterSettings | None,
) -> ControlPlaneConfig:
    made = ControlPlaneConfig(
        cluster=authority.cluster,
        unit=config.unit.name,
        login=login,
        generation=config.generation,
        external=authority.external,
        tickets=dict(tickets),
        settings=settings,
    )
    seed = "" if public else there.seed if there is not None and there.seed else keys.new_seed("user")
    if authority.external is not None:
        return msgspec.structs.replace(made, seed=seed)
    try:
        keys_of = msgspec.json.decode(public or public_of("control-plane", seed), type=_PlaneKeys)
    except (msgspec.DecodeError, RecursionError):
        raise keys.BadKey("these are no keys of a control plane") from None
    key = keys_of.key
    authority.ledger.add_plane(made.unit, Plane(key, keys_of.signer))
    signs = authority.signer
    was = tokens.read_token(there.token, authority.issuer) if there is not None else None
    kept = was is not None and was.sub == key and not signs.is_due(was, "control-plane")
    token = there.token if kept and there is not None else ""
    accounts: dict[Account, str] = {name: authority.account_token(name) for name in authority.accounts}
    if there is not None:
        accounts |= {name: there.accounts[name] for name in accounts if _same(accounts, there.accounts, name)}
    return msgspec.structs.replace(
        made,
        seed=seed,
        token=token or signs.mint(key, made.unit, "control-plane", (), life_s("control-plane")),
        operator_key=keys.public(authority.operator),
        accounts=accounts,
        tls=authority.sign_signer(keys_of.tls, made.unit, there=there.tls if there is not None else ""),
    )


def _same(made: Mapping[Any, str], there: Mapping[Any, str], account: str) -> bool:
    """Whether both have a token of an account that says the same: only when they were made differs."""
    one, other = tokens.peek(made[account]), tokens.peek(there.get(account, ""))
    return one is not None and other is not None and one.says(other)


class _PlaneKeys(msgspec.Struct, frozen=True):
    """The public keys of a control plane: its own, those with which it signs tokens and certificates."""

    key: str
    signer: str
    tls: str  # in PEM


def _tls_key(seed: str) -> str:
    """The private key by which a control plane signs certificates, whose own has this seed."""
    return keys.derived_tls_key(seed, "certificates")


def signing_seed(seed: str) -> str:
    """The seed of the key with which a control plane signs, whose own is `seed`."""
    return keys.derived_seed(seed, "signer", "account")


def ticket_for(
    authority: Authority, role: TicketRole, queues: Sequence[str], login: Login, there: str
) -> tuple[str, TicketRecord]:
    """A ticket for any number of uses, for ever, and its record: the one that is `there`, if it fits."""
    ticket = _fitting(authority, role, tuple(queues), login, there)
    ticket = ticket or authority.ticket(role, queues, login, None)
    claims = tokens.peek(ticket.login.jwt)
    since = claims.iat * 1000 if claims is not None and authority.external is None else 0
    return encode_ticket(ticket), msgspec.structs.replace(record_of(authority, ticket, uses=0), since=since)


def _fitting(
    authority: Authority, role: TicketRole, queues: tuple[str, ...], login: Login, there: str
) -> Ticket | None:
    try:
        ticket = decode_ticket(there)
    except (TicketRefused, VersionsDiffer):
        return None
    if (ticket.cluster, ticket.role, ticket.queues) != (authority.cluster, role, queues):
        return None
    if authority.external is not None:
        return ticket if ticket.login == authority.external else None
    ours = tokens.read_token(ticket.login.jwt, authority.issuer) is not None
    return ticket if ours and (ticket.login.urls, ticket.login.ca) == (login.urls, login.ca) else None


# ---- Where a unit is


def new_key(role: RoleName) -> str:
    """A new key for a unit of `role`: its secret half, as text."""
    return keys.new_tls_key() if role in ("broker", "balancer") else keys.new_seed("user")


def public_of(role: RoleName, key: str) -> str:
    """What `make_config` wants to know of a key that `new_key` made for `role`. Raises keys.BadKey."""
    if role == "control-plane":
        tls, signer = keys.public_tls_key(_tls_key(key)), keys.public(signing_seed(key))
        return msgspec.json.encode(_PlaneKeys(keys.public(key), signer, tls)).decode()
    return keys.public_tls_key(key) if role in ("broker", "balancer") else keys.public(key)


def revoke_public(authority: Authority, public: str) -> None:
    """Have a unit's key, of which `public_of` says this, be believed no more, once the broker was told. One
    of a broker or a balancer is in no account."""
    ledger = authority.ledger
    try:
        plane = msgspec.json.decode(public, type=_PlaneKeys)
    except msgspec.DecodeError:
        for account in (ACCOUNTS["worker"], ACCOUNTS["executor"]):
            ledger.revoke(account, public)
    else:
        ledger.revoke(ACCOUNTS["control-plane"], plane.key)
        ledger.revoke("signers", plane.signer)


def with_seed(data: bytes, key: str) -> bytes:
    """A file of `make_config` with the secret half of the key that it was made for. Raises Usage."""
    member = _decoded(data, MemberConfig)
    if member is not None:
        login = member.identity.login
        if not login.jwt or login.seed:
            return data  # of a broker of the user's own: it is lent to all, or there is none
        identity = msgspec.structs.replace(member.identity, login=msgspec.structs.replace(login, seed=key))
        return msgspec.json.encode(msgspec.structs.replace(member, identity=identity))
    found = (
        _decoded(data, ControlPlaneConfig) or _decoded(data, BrokerConfig) or _decoded(data, BalancerConfig)
    )
    if found is not None:
        return msgspec.json.encode(msgspec.structs.replace(found, seed=key))
    raise Usage("this is no file of a unit", hint="use one version of mvmci on both machines")


def without_seed(data: bytes) -> tuple[bytes, str, int]:
    """A file of a unit without its secret half, that half, and the generation of the key: what `make_config`
    takes as `there`. Empty for what is no such file."""
    member = _decoded(data, MemberConfig)
    if member is not None:
        login = member.identity.login
        identity = msgspec.structs.replace(member.identity, login=msgspec.structs.replace(login, seed=""))
        bare = msgspec.structs.replace(member, identity=identity)
        return msgspec.json.encode(bare), login.seed, member.generation
    plane = _decoded(data, ControlPlaneConfig)
    if plane is not None:
        bare_plane = msgspec.structs.replace(plane, seed="", operator="", account="", system="")
        return msgspec.json.encode(bare_plane), plane.seed, plane.generation
    other = _decoded(data, BrokerConfig) or _decoded(data, BalancerConfig)
    if other is None:
        return b"", "", 0
    return msgspec.json.encode(msgspec.structs.replace(other, seed="")), other.seed, 0


# ---- In the control plane


async def make_known(cluster: Cluster, plane: ControlPlaneConfig) -> None:
    """Write what the cluster is, and which tickets there are. Waits for a broker, and for whoever makes
    the streams, if that is not us. Raises TicketRefused, Usage.
    """
    while True:
        try:
            if plane.settings is not None:
                await cluster.maintain(plane.settings)  # again is free
                await cluster.config.put_settings(plane.settings)
            for ticket, record in plane.tickets.items():
                await change_ticket(cluster.config, ticket, functools.partial(_first, record))
            return
        except StoreUnavailable as away:
            log.info("cannot record the tickets: %s; will retry", away.message)
        await asyncio.sleep(KNOWN_PAUSE_S)


def _first(new: TicketRecord, there: TicketRecord | None) -> TicketRecord | None:
    """What stands there stays: it says who used the ticket, and whether it was revoked."""
    return new if there is None else None
