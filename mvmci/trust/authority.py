"""The keys of one cluster, on the machine that `up` was called on, and what they give out.

    keys/operator account system             seeds: who signs for the broker, its users, its own account
    keys/ca.key ca.pem broker.key broker.pem        the private CA, and the broker's certificate
    keys/engine.token                        what executors ask for over HTTP
    keys/owner                               what tells the cluster from another one of its name
    keys/ledger                              which keys of control planes sign, and what was revoked
    keys/external.json                       instead of all these: the login to a broker of the user's own

Owns that folder (0700, files 0600). Every file is written whole, and what a crash left out is made when
the folder is made again. Whoever has this folder is the cluster.

A broker of the user's own has its own operator, who gave us one login. It is lent to every unit as it
is: it cannot be narrowed, renewed or revoked, and who wants that is told so.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mvmci.cluster.broker import Guard
from mvmci.cluster.identity import TLS_NAME, Identity, Login, Ticket, TicketRole, UnitRole
from mvmci.errors import StoreUnavailable, Usage
from mvmci.system import keys
from mvmci.system.files import write_private
from mvmci.trust import tokens
from mvmci.trust.known import KEYS
from mvmci.trust.ledger import Ledger
from mvmci.trust.signer import Signer, life_s

if TYPE_CHECKING:
    from mvmci.trust.accounts import Account
    from mvmci.trust.permissions import Grantee

ADMIN_S = 3600
SYSTEM_S = 300
TICKET_ID_BYTES = 5
_OPERATOR, _ACCOUNT, _SYSTEM = "operator", "account", "system"
_CA_KEY, _CA = "ca.key", "ca.pem"
TOKEN, TOKEN_BYTES = "engine.token", 32
_OWNER, OWNER_DIGITS = "owner", 16
KEY, CERTIFICATE = "broker.key", "broker.pem"
_EXTERNAL = "external.json"
_KINDS: dict[str, keys.KeyKind] = {_OPERATOR: "operator", _ACCOUNT: "account", _SYSTEM: "account"}

_identities = msgspec.json.Decoder(Identity)
_logins = msgspec.json.Decoder(Login)


@dataclass(frozen=True, kw_only=True)
class Authority:
    """What gives out the credentials of one cluster. Secret.

    Where a method takes `base`, that says where to dial and whom to trust, and the method adds as whom.
    """

    cluster: str
    folder: Path  # of the keys
    operator: str = field(default="", repr=False)  # these three are seeds
    account: str = field(default="", repr=False)
    system: str = field(default="", repr=False)
    ca: str = ""
    external: Login | None = field(default=None, repr=False)
    now: Callable[[], float] = time.time

    @staticmethod
    def create(folder: Path) -> Authority:
        """The authority of the cluster whose folder is `folder`; what is missing of it is made.

        Not for two processes at a time: `up` holds the cluster's lock.
        """
        place, now = folder / KEYS, time.time()
        (place / _EXTERNAL).unlink(missing_ok=True)
        for name, kind in _KINDS.items():
            if not (place / name).exists():
                write_private(place / name, keys.new_seed(kind).encode())
        # A certificate is written after its key: as long as it is not there, nobody trusts that key.
        if not (place / _CA).exists():
            (place / CERTIFICATE).unlink(missing_ok=True)
            _write_all(place, (_CA_KEY, _CA), keys.new_ca(folder.name, now))
        ca = (place / _CA).read_text()
        if (widened := keys.widened_ca((place / _CA_KEY).read_text(), ca, now)) != ca:
            write_private(place / _CA, widened.encode())
        _make_names(place)
        if not (place / CERTIFICATE).exists():
            key, authority = keys.new_tls_key(), Authority.load(folder)
            certificate = authority.sign_certificate(keys.public_tls_key(key))
            _write_all(place, (KEY, CERTIFICATE), (key, certificate))
        return Authority.load(folder)

    @staticmethod
    def of_external(folder: Path, login: Login) -> Authority:
        """The same for a broker of the user's own, whose one `login` every unit gets."""
        write_private(folder / KEYS / _EXTERNAL, msgspec.json.encode(login))
        _make_names(folder / KEYS)
        return Authority.load(folder)

    @staticmethod
    def load(folder: Path) -> Authority:
        """The authority of the cluster whose folder is `folder`. Raises StoreUnavailable."""
        place = folder / KEYS
        try:
            if (place / _EXTERNAL).exists():
                external = _logins.decode((place / _EXTERNAL).read_bytes())
                return Authority(cluster=folder.name, folder=place, external=external)
            names = (_OPERATOR, _ACCOUNT, _SYSTEM, _CA)
            operator, account, system, ca = ((place / name).read_text() for name in names)
            for seed in (operator, account, system):
                keys.public(seed)
            return Authority(
                cluster=folder.name, folder=place, operator=operator, account=account, system=system, ca=ca
            )
        except (OSError, msgspec.DecodeError, keys.BadKey) as error:
            raise StoreUnavailable(
                f"the keys of cluster {folder.name} are not on this machine, or cannot be read",
                hint="do this as the user, and on the machine, that called `mvmci up`",
            ) from error

    @property
    def issuer(self) -> str:
        """The public key that signs the tokens of units, which is also the name of the main account."""
        return keys.public(self.account)

    @property
    def accounts(self) -> dict[Account, str]:
        """The public key of each account."""
        from mvmci.trust.accounts import ACCOUNTS

        own: dict[Account, str] = {"main": self.issuer, "system": keys.public(self.system)}
        return own | {
            account: keys.public(keys.derived_seed(self.account, account, "account"))
            for account in ACCOUNTS.values()
            if account not in own
        }

    def login(self, urls: Sequence[str], *, tls: bool) -> Login:
        """Where to dial and whom to trust, for a broker at `urls`."""
        return self.external or Login(urls=tuple(urls), ca=self.ca if tls else "")

    @property
    def ledger(self) -> Ledger:
        """What only who has these keys may say."""
        return Ledger(self.folder)

    @property
    def signer(self) -> Signer:
        """What mints the tokens of units."""
        accounts = self.accounts if self.external is None else {}
        return Signer(cluster=self.cluster, accounts=accounts, seed=self.account, now=self.now)

    def identity(self, unit: str, role: UnitRole, queues: Sequence[str], base: Login, path: Path) -> Identity:
        """The identity of a unit of `up`, kept at `path`: the one that is there, as long as it still fits.

        A unit keeps its key over all changes.
        """
        there = read_identity(path)
        made = self.renewed(there, unit, role, queues, base)
        if made != there:
            write_identity(path, made)
        return made

    def renewed(
        self,
        there: Identity | None,
        unit: str,
        role: UnitRole,
        queues: Sequence[str],
        base: Login,
        *,
        seed: str = "",
        public: str = "",
    ) -> Identity:
        """The same, kept nowhere. `seed` is its key where it has none yet; without one, it gets a new one.
        Where the seed lies elsewhere, `public` is what it is the seed of, and the identity has none."""
        if there is not None and self._fits(there, unit, role, tuple(queues), base, public):
            return there
        if public:
            login = self._grant_to(base, public, unit, role, queues, life_s(role))
        else:
            if there is not None and there.unit == unit and self._issued(there):
                seed = there.login.seed
            login = self._grant(base, seed or keys.new_seed("user"), unit, role, queues, life_s(role))
        return Identity(cluster=self.cluster, unit=unit, role=role, queues=tuple(queues), login=login)

    def admin(self, base: Login) -> Identity:
        """Who a verb is on this machine. It is kept nowhere."""
        unit = f"admin-{secrets.token_hex(4)}"
        login = self._grant(base, keys.new_seed("user"), unit, "admin", (), ADMIN_S)
        return Identity(cluster=self.cluster, unit=unit, role="admin", login=login)

    def system_login(self, base: Login) -> Login:
        """A login to the broker's own account. Raises Usage where the broker is not ours."""
        if self.external is not None:
            raise Usage(
                f"the broker of cluster {self.cluster} is not mvmci's, so this cannot be done here",
                hint="its operator can: every unit has the one credential that `broker.credentials` names",
            )
        unit = f"system-{secrets.token_hex(4)}"
        return self._grant(base, keys.new_seed("user"), unit, "system", (), SYSTEM_S)

    def ticket(self, role: TicketRole, queues: Sequence[str], base: Login, ttl_s: float | None) -> Ticket:
        """A right to enrol for `ttl_s`; None is for ever. It is worth nothing without a record of it."""
        name = secrets.token_hex(TICKET_ID_BYTES)
        tags = tokens.tags("enrol", role, queues)
        login = self._grant(base, keys.new_seed("user"), name, "bootstrap", queues, ttl_s, tags)
        return Ticket(
            id=name,
            cluster=self.cluster,
            role=role,
            queues=tuple(queues),
            expires_at=int((self.now() + ttl_s) * 1000) if ttl_s is not None else 0,
            login=login,
        )

    def account_token(self, account: Account, revoked: Iterable[str] = (), after: float = 0) -> str:
        """The token of an account of the cluster, newer than `after`, s since 1970. It says what the ledger
        says, and takes these `revoked` keys away as well."""
        from mvmci.stores.nats.layout import Layout
        from mvmci.trust.accounts import ENROLS, shares

        publics, signers = self.accounts, set[str]()
        if account not in ("main", "system"):
            signers.add(self.issuer)
        if account in ENROLS:
            signers |= self.ledger.signers()
        return tokens.account(
            self.operator,
            publics[account],
            self.cluster if account == "main" else f"{self.cluster}-{account}",
            max(self.now(), after + 1),
            store=account == "main",
            revoked={*revoked, *self.ledger.revoked(account)},
            signers=signers,
            shares=shares(Layout(self.cluster), account, publics),
        )

    def sign_certificate(
        self,
        public_key: str,
        names: Sequence[str] = (),
        addresses: Sequence[str] = (),
        *,
        of: str = TLS_NAME,
        there: str = "",
    ) -> str:
        """A certificate for who has the key of `public_key`, all in PEM: under the name `of` its kind, the
        `names` of its host and its IP `addresses`. A broker may show it where it dials. The one that is
        `there`, if it is just that. Raises keys.BadKey, ValueError.
        """
        named, now = (of, *(name for name in names if name != of)), self.now()
        signed = keys.is_signed(there, self.ca)
        if signed and keys.is_certificate_for(there, public_key, names=named, addresses=addresses, now=now):
            return there
        return keys.sign_certificate(
            self._ca_key, self.ca, public_key, names=named, addresses=addresses, now=now, dials=of == TLS_NAME
        )

    def sign_signer(self, public_key: str, unit: str, *, there: str = "") -> str:
        """The certificate, in PEM, by which a control plane signs those of executors, and none of brokers.
        The one that is `there`, if it is just that. Raises keys.BadKey."""
        now, signed = self.now(), keys.is_signed(there, self.ca)
        if signed and keys.is_certificate_for(there, public_key, names=(), addresses=(), now=now):
            return there
        name = f"mvmci {self.cluster} {unit}"
        return keys.sign_ca(self._ca_key, self.ca, public_key, name, never=TLS_NAME, now=now)

    @property
    def _ca_key(self) -> str:
        return (self.folder / _CA_KEY).read_text()

    @property
    def token(self) -> str:
        """What executors ask for over HTTP. Empty where none was made yet."""
        file = self.folder / TOKEN
        return file.read_text() if file.exists() else ""

    @property
    def owner(self) -> str:
        """What tells it from another cluster of its name, on a host of it: no secret, and always the same."""
        file = self.folder / _OWNER
        return file.read_text() if file.exists() else _first_owner(self.token)

    def guard(self) -> Guard | None:
        """Whom a broker of ours believes; None where it is not ours."""
        if self.external is not None:
            return None
        system = keys.public(self.system)
        return Guard(
            operator=tokens.operator(self.operator, self.cluster, system, self.now()),
            signer=keys.public(self.operator),
            system_account=system,
            accounts={public: self.account_token(account) for account, public in self.accounts.items()},
            certificate=self.folder / CERTIFICATE,
            key=self.folder / KEY,
        )

    def _grant(
        self,
        base: Login,
        seed: str,
        unit: str,
        role: Grantee,
        queues: Sequence[str],
        ttl_s: float | None,
        tags: tuple[str, ...] = (),
    ) -> Login:
        """`base` as `unit`, with the key of `seed`."""
        granted = self._grant_to(base, keys.public(seed), unit, role, queues, ttl_s, tags)
        return granted if self.external is not None else msgspec.structs.replace(granted, seed=seed)

    def _grant_to(
        self,
        base: Login,
        public: str,
        unit: str,
        role: Grantee,
        queues: Sequence[str],
        ttl_s: float | None,
        tags: tuple[str, ...] = (),
    ) -> Login:
        """The same for who has the seed of `public`, which is yet to be filled in."""
        if self.external is not None:
            return self.external
        signer = self.signer if role != "system" else replace(self.signer, seed=self.system)
        token = signer.mint(public, unit, role, queues, ttl_s, tags)
        return as_unit(base, self.cluster, role, unit, jwt=token, seed="")

    def _fits(
        self,
        there: Identity,
        unit: str,
        role: UnitRole,
        queues: tuple[str, ...],
        base: Login,
        public: str = "",
    ) -> bool:
        """Whether an identity is still what is wanted, and good for a while."""
        if (there.cluster, there.unit, there.role, there.queues) != (self.cluster, unit, role, queues):
            return False
        if self.external is not None:
            return there.login == self.external
        if (there.login.urls, there.login.ca) != (base.urls, base.ca):
            return False
        claims = self._issued(there, public)
        return claims is not None and not self.signer.is_due(claims, role)

    def _issued(self, there: Identity, public: str = "") -> tokens.Claims | None:
        """What its token says, if it is one of ours and for its key: `public`, where its seed is not here."""
        if self.external is not None or (public and there.login.seed):
            return None
        believed = (self.issuer, *self.ledger.signers())
        told = (tokens.read_token(there.login.jwt, one) for one in believed)
        claims = next((one for one in told if one is not None), None)
        try:
            key = public or keys.public(there.login.seed)
        except keys.BadKey:
            return None
        return claims if claims is not None and claims.sub == key else None


def as_unit(base: Login, cluster: str, role: Grantee, unit: str, *, jwt: str, seed: str) -> Login:
    """`base` with the token of a unit and the seed of its key."""
    from mvmci.stores.nats.layout import Layout
    from mvmci.trust.permissions import api, inbox

    names = {"inbox": inbox(role, unit), "api": api(Layout(cluster), role)}
    return msgspec.structs.replace(base, jwt=jwt, seed=seed, **names)


def read_identity(path: Path) -> Identity | None:
    """The identity at `path`; None when there is none that can be read."""
    try:
        return _identities.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return None


def write_identity(path: Path, identity: Identity) -> None:
    """Keep `identity` at `path`, 0600."""
    write_private(path, msgspec.json.encode(identity))


def _make_names(place: Path) -> None:
    """What executors ask for, and whose the cluster is."""
    if not (place / TOKEN).exists():
        write_private(place / TOKEN, secrets.token_hex(TOKEN_BYTES).encode())
    if not (place / _OWNER).exists():
        write_private(place / _OWNER, _first_owner((place / TOKEN).read_text()).encode())


def _first_owner(token: str) -> str:
    """That of a cluster whose first token is `token`, which may be taken away; hosts know it by that."""
    return hashlib.sha256(token.encode()).hexdigest()[:OWNER_DIGITS]


def _write_all(place: Path, names: tuple[str, str], texts: tuple[str, str]) -> None:
    for name, text in zip(names, texts, strict=True):
        write_private(place / name, text.encode())


def read_credentials(text: str, name: str) -> tuple[str, str]:
    """The token and the seed in a .creds file; `name` is the file's, for messages. Raises Usage."""
    lines = [line.strip() for line in text.splitlines()]
    token = next((line for line in lines if line.startswith("eyJ")), "")
    seed = next((line for line in lines if line.startswith("SU")), "")
    try:
        if token and keys.is_public_key(keys.public(seed), "user"):
            return token, seed
    except keys.BadKey:
        pass
    raise Usage(
        f"{name} is no .creds file of a NATS user",
        hint="one has a JWT, and the seed of the key that it is for; `nsc generate creds` writes it",
    )
