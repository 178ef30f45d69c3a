"""Tokens: the JWTs that a broker in operator mode believes. Pure functions of keys, names and times.

    operator ── signs ──► account ── signs ──► user
      signs itself          revocations          allow lists, expiry, limits

A user's token says which subjects it may publish and subscribe, and nothing that is not listed: a rule
that denies has had ways around it before. An account's token is the one place that takes a key away.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from mvmci.stores.nats.permissions import Permissions
from mvmci.trust import keys

_VERSION = 2  # of NATS' claims
_UNLIMITED = -1
SUBSCRIPTIONS_MAX = 4_096  # of one connection
_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}


class Claims(msgspec.Struct, frozen=True):
    """What a token says of whom, as far as we read it. Times are seconds since 1970; 0 is never."""

    iss: str
    sub: str
    name: str = ""
    iat: int = 0
    exp: int = 0
    tags: tuple[str, ...] = ()


def operator(seed: str, name: str, system_account: str, now: float) -> str:
    """The token of an operator, which it signs itself."""
    nats = {"type": "operator", "version": _VERSION, "system_account": system_account}
    return _sign(seed, keys.public(seed), name, nats, now)


def account(
    operator_seed: str, public: str, name: str, now: float, *, store: bool, revoked: Mapping[str, int]
) -> str:
    """The token of an account. `store` lets it use JetStream, within what the server has.

    `revoked` maps users' public keys to the time of the last of their tokens that is no longer taken.
    """
    every = ("subs", "data", "payload", "imports", "exports", "conn")
    limits: dict[str, Any] = dict.fromkeys(every, _UNLIMITED) | {"leaf": 0, "wildcards": True}
    if store:
        of_store = ("mem_storage", "disk_storage", "streams", "consumer", "max_ack_pending")
        limits |= dict.fromkeys(of_store, _UNLIMITED)
    nats: dict[str, Any] = {"type": "account", "version": _VERSION, "limits": limits}
    if revoked:
        nats["revocations"] = dict(revoked)
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
) -> str:
    """The token of a user. `expires_at` is in seconds since 1970: the broker then cuts the connection."""
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
    if permissions.answers_s:
        nats["resp"] = {"max": 1, "ttl": int(permissions.answers_s * 1e9)}
    if tags:
        nats["tags"] = list(tags)
    return _sign(account_seed, public, name, nats, now, exp=expires_at)


def read(token: str, issuer: str) -> Claims | None:
    """What `token` says, if `issuer` signed it. Whether it has expired is not looked at."""
    head, _, signature = token.rpartition(".")
    try:
        if not keys.verify(issuer, head.encode(), _unpadded(signature)):
            return None
    except ValueError:
        return None
    claims = peek(token)
    return claims if claims is not None and claims.iss == issuer else None


def peek(token: str) -> Claims | None:
    """What `token` says, whoever signed it; None if it is no token."""
    try:
        body = msgspec.json.decode(_unpadded(token.split(".")[1]), type=dict[str, Any])
        tags = body.get("nats", {}).get("tags", ())
        return msgspec.convert({**body, "tags": tags}, Claims)
    except (IndexError, ValueError, AttributeError):
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
