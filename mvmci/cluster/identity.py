"""Who a process is to a cluster, and the tickets that make it somebody: values and their coding.

A `Login` is what a connection needs. An `Identity` is a login with a name and a role, kept 0600. A
`Ticket` is one line of text that lets a machine ask for an identity: where to dial, whom to trust, and
a credential that may do that one thing. Its checksum finds slips of copying; what it may do is decided
by the cluster when it is used.

    mvmci1_<base64url of JSON, then the first 4 bytes of its SHA-256>
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Literal

import msgspec

from mvmci.errors import TicketRefused, VersionsDiffer
from mvmci.jobs.job import Id
from mvmci.wire import HINT

PREFIX = "mvmci1_"
TICKET_CHARS_MAX = 8_192
CHECKSUM_BYTES = 4
ANY_INBOX = "_INBOX"
TLS_NAME = "broker.mvmci"  # what every broker's certificate is made out to, whatever its address
ENGINE_TLS_NAME = "executor.mvmci"  # the same of who answers HTTP
_OTHER_VERSION = re.compile(r"mvmci[0-9]+_")

TicketRole = Literal["worker", "executor", "client"]
TICKET_ROLES: tuple[TicketRole, ...] = ("worker", "executor", "client")
UnitRole = TicketRole | Literal["control-plane", "admin", "system"]


class Login(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a process reaches a broker: where to dial, whom to trust, and as whom.

    `ca` is the PEM of the one CA that is trusted, and empty where there is no TLS. `jwt` and `seed` (of
    the key that it names) are empty where the broker asks for no credential.
    """

    urls: tuple[str, ...]
    ca: str = ""
    jwt: str = ""
    seed: str = ""
    inbox: str = ANY_INBOX  # answers come beneath it, and nobody else may listen there
    api: str = ""  # what requests to the store begin with, if it has a name of its own in this account

    @property
    def has_name(self) -> bool:
        """Whether it is of one unit, and not lent to all of them."""
        return self.inbox != ANY_INBOX


class Identity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A unit of a cluster, as it knows itself. Secret."""

    cluster: str
    unit: str
    role: UnitRole
    queues: tuple[str, ...] = ()
    login: Login
    named: bool = False  # whether it was started under a name that somebody chose


class Ticket(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A right to enrol. Secret. `expires_at` is ms since 1970; 0 is never."""

    id: Id
    cluster: Id  # the name of a folder, too
    role: TicketRole
    queues: tuple[str, ...] = ()
    expires_at: int = 0
    login: Login


_encode = msgspec.json.Encoder().encode
_tickets = msgspec.json.Decoder(Ticket)


def encode_ticket(ticket: Ticket) -> str:
    """`ticket` as one line of text."""
    data = _encode(ticket)
    return PREFIX + base64.urlsafe_b64encode(data + _checksum(data)).decode().rstrip("=")


def decode_ticket(text: str) -> Ticket:
    """The ticket that `text` is. Raises TicketRefused, VersionsDiffer; the text is in no message."""
    text = text.strip()
    if not text.startswith(PREFIX):
        if _OTHER_VERSION.match(text):
            raise VersionsDiffer("the ticket was made by another version of mvmci", hint=HINT)
        raise TicketRefused("this is not a ticket", hint=f"a ticket is one line that begins with {PREFIX}")
    damaged = TicketRefused(
        "the ticket is damaged: its checksum does not fit", hint="copy all of its one line, or make a new one"
    )
    if len(text) > TICKET_CHARS_MAX:
        raise damaged
    body = text.removeprefix(PREFIX)
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise damaged from None
    data, checksum = raw[:-CHECKSUM_BYTES], raw[-CHECKSUM_BYTES:]
    if checksum != _checksum(data):
        raise damaged
    try:
        return _tickets.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise damaged from None


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:CHECKSUM_BYTES]
