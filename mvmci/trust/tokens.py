"""Tokens: the JWTs that a broker in operator mode believes. Pure functions of keys, names and times.

    operator ── signs ──► account ────────── signs ──► user
      signs itself          imports, exports,            allow lists, expiry, limits
                            revocations

A user's token says which subjects it may publish and subscribe, and nothing that is not listed: a rule
that denies has had ways around it before. An account's token says what reaches other accounts, and is the
one place that takes a key away, and says who signs its users: the key of the main account for all of a
cluster, and for who may enrol a key of each control plane.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from mvmci.system import keys

if TYPE_CHECKING:
    from mvmci.trust.permissions import Permissions

_VERSION = 2  # of NATS' claims
_UNLIMITED = -1
SUBSCRIPTIONS_MAX = 4_096  # of one connection
_QUEUE, _ORIGIN = "queue:", "cluster"
_FOR_GOOD = 9_999_999_999  # s since 1970: no token is younger
_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}


class Claims(msgspec.Struct, frozen=True):
    """What a token says of whom, as far as we read it. Times are seconds since 1970; 0 is never."""

    iss: str
    sub: str
    name: str = ""
    iat: int = 0
    exp: int = 0
    tags: tuple[str, ...] = ()
    revoked: frozenset[str] = frozenset()  # of an account's: the users' keys that it takes away
    publish: tuple[str, ...] = ()  # what a user's allows
    subscribe: tuple[str, ...] = ()
    issuer_account: str = ""  # of a user's: its account, if that is not `iss`
    shares: str = ""  # what an account's imports and exports, as it is written there
    signers: frozenset[str] = frozenset()  # of an account's: who else signs its users

    @property
    def account(self) -> str:
        """The account of a user."""
        return self.issuer_account or self.iss

    @property
    def origin(self) -> str:
        """What tells its cluster from another one of that name: who signs where the cluster's keys are."""
        return self.tagged(_ORIGIN) or self.iss

    def says(self, other: Claims) -> bool:
        """Whether another token of this account says the same."""
        return (self.iss, self.sub, self.revoked, self.signers, self.shares) == (
            other.iss, other.sub, other.revoked, other.signers, other.shares,
        )  # fmt: skip

    def is_old(self, now: float) -> bool:
        """Whether two thirds of its life are over."""
        return self.exp > 0 and self.exp - now <= (self.exp - self.iat) / 3

    def tagged(self, kind: str) -> str:
        """The role that the token is tagged with; empty if it is not of this `kind`."""
        return next((tag.removeprefix(f"{kind}:") for tag in self.tags if tag.startswith(f"{kind}:")), "")

    @property
    def queues(self) -> tuple[str, ...]:
        """Those that the token is tagged with."""
        return tuple(tag.removeprefix(_QUEUE) for tag in self.tags if tag.startswith(_QUEUE))


def operator(seed: str, name: str, system_account: str, now: float) -> str:
    """The token of an operator, which it signs itself."""
    nats = {"type": "operator", "version": _VERSION, "system_account": system_account}
    return _sign(seed, keys.public(seed), name, nats, now)


def account(
    operator_seed: str,
    public: str,
    name: str,
    now: float,
    *,
    store: bool,
    revoked: Iterable[str],
    signers: Iterable[str] = (),
    shares: dict[str, Any] | None = None,
) -> str:
    """The token of an account. `store` lets it use JetStream, within what the server has.

    `revoked` are users' public keys. They are taken away for good, so that no clock has a say in it.
    `signers` are the public keys of who signs its users beside itself; `shares` its imports and exports as
    NATS writes them.
    """
    every = ("subs", "data", "payload", "imports", "exports", "conn")
    limits: dict[str, Any] = dict.fromkeys(every, _UNLIMITED) | {"leaf": 0, "wildcards": True}
    if store:
        of_store = ("mem_storage", "disk_storage", "streams", "consumer", "max_ack_pending")
        limits |= dict.fromkeys(of_store, _UNLIMITED)
    nats: dict[str, Any] = {"type": "account", "version": _VERSION, "limits": limits} | (shares or {})
    if others := sorted(signers):
        nats["signing_keys"] = others
    revocations = dict.fromkeys(sorted(revoked), _FOR_GOOD)
    if revocations:
        nats["revocations"] = revocations
    return _sign(operator_seed, public, name, nats, now)


def user(
    account_seed: str,
    public: str,
    name: str,
    permissions: Permissions,
    now: float,
    *,
    expires_at: int,
    payload_max: int,
    tags: tuple[str, ...] = (),
    account: str = "",
) -> str:
    """The token of a user. `expires_at` is in seconds since 1970: the broker then cuts the connection.

    `account` is the public key of its account, if that is not the one that signs.
    """
    assert permissions.publish and permissions.subscribe, "an empty list would allow everything"
    nats: dict[str, Any] = {
        "type": "user",
        "version": _VERSION,
        "pub": {"allow": list(permissions.publish)},
        "sub": {"allow": list(permissions.subscribe)},
        "subs": SUBSCRIPTIONS_MAX,
        "data": _UNLIMITED,
        "payload": payload_max,
        "allowed_connection_types": ["STANDARD"],
    }
    if tags:
        nats["tags"] = list(tags)
    if account:
        nats["issuer_account"] = account
    return _sign(account_seed, public, name, nats, now, exp=expires_at)


def tags(kind: str, role: str, queues: Sequence[str]) -> tuple[str, ...]:
    """What a token says for us alone: `kind` is `role` for a unit's, `enrol` for a ticket's."""
    return (f"{kind}:{role}", *(f"{_QUEUE}{queue}" for queue in queues))


def origin_tag(issuer: str) -> str:
    """What a token says of its cluster that `issuer` did not sign itself."""
    return f"{_ORIGIN}:{issuer}"


def written(shares: dict[str, Any]) -> str:
    """Imports and exports in a form that can be compared."""
    return msgspec.json.encode(shares, order="sorted").decode()


def read_token(token: str, issuer: str) -> Claims | None:
    """What `token` says, if `issuer` signed it. Whether it has expired is not looked at."""
    head, _, signature = token.rpartition(".")
    try:
        signed = keys.verify(issuer, head.encode(), _unpadded(signature))
    except ValueError:
        return None
    return peek(token) if signed else None


def peek(token: str) -> Claims | None:
    """What `token` says, whoever signed it; None if it is no token."""
    try:
        body = msgspec.json.decode(_unpadded(token.split(".")[1]), type=dict[str, Any])
        nats = body.get("nats", {})
        own = {
            "tags": nats.get("tags", ()),
            "revoked": list(nats.get("revocations", ())),
            "publish": nats.get("pub", {}).get("allow", ()),
            "subscribe": nats.get("sub", {}).get("allow", ()),
            "issuer_account": nats.get("issuer_account", ""),
            "signers": list(nats.get("signing_keys", ())),
            "shares": written({part: nats[part] for part in ("exports", "imports") if part in nats}),
        }
        return msgspec.convert(body | own, Claims)
    except (IndexError, ValueError, AttributeError, TypeError, RecursionError):
        return None


def _sign(seed: str, subject: str, name: str, nats: dict[str, Any], now: float, exp: int = 0) -> str:
    claims: dict[str, Any] = {"iat": int(now), "iss": keys.public(seed), "name": name, "sub": subject}
    claims |= {"exp": exp} if exp else {}
    claims |= {"nats": nats}
    digest = hashlib.sha256(msgspec.json.encode(claims)).digest()
    claims["jti"] = base64.b32encode(digest).decode().rstrip("=")
    head = f"{_b64(msgspec.json.encode(_HEADER))}.{_b64(msgspec.json.encode(claims))}"
    return f"{head}.{_b64(keys.sign(seed, head.encode()))}"


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
