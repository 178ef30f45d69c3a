"""The accounts of a cluster on its broker, and what each takes from the others.

    main        the streams; control planes, and verbs on the machine that has the keys
    workers     executors     clients     tickets        a kind of unit each, and no stream
    system      the broker's own

JetStream answers with rights of its own on whatever subject a request names, and an answer can be bytes
that the asker stored before. In an account that has no stream such an answer ends where it began: a
service that is imported gives its answer to the asker's account, and what is imported under a wildcard is
not reached by an answer (both are tried by the tests of trust, for each role and each of its requests).

So an account imports what its role may publish, for any unit and queue, as services, and what it may
hear as streams; the tokens of its units narrow that to their own names. What comes in by a service is
not handed on to streams that others import: that is why JetStream says again what it stored
(`Layout.stored`), and why workers and executors take their orders and replies from each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mvmci.stores.nats.layout import Layout
from mvmci.trust.permissions import JS_API, MANY_ANSWERS, Grantee, api, permissions

Account = Literal["main", "workers", "executors", "clients", "tickets", "system"]
ACCOUNTS: dict[Grantee, Account] = {
    "control-plane": "main",
    "admin": "main",
    "worker": "workers",
    "executor": "executors",
    "client": "clients",
    "bootstrap": "tickets",
    "system": "system",
}
ENROLS: tuple[Account, ...] = ("workers", "executors", "clients")  # control planes sign for these
_IMPORTING: tuple[Grantee, ...] = ("worker", "executor", "client", "bootstrap")
ANSWERS_S_MAX = 30  # well beyond a pull; so long the broker keeps in mind whose answers those are
_ANY = re.compile(r"[^.]*\*[^.]*")  # a token that ends in what is the unit's own


@dataclass(frozen=True)
class Import:
    """What an account takes from `exporter`. `local` is its name here."""

    kind: Literal["service", "stream"]
    exporter: Account
    subject: str
    local: str

    @property
    def streamed(self) -> bool:
        """Whether a request has more than one answer."""
        return self.subject.startswith(MANY_ANSWERS)


def imports(layout: Layout, account: Account) -> tuple[Import, ...]:
    """What the units of `account` need of other accounts."""
    return tuple(dict.fromkeys(_imports(layout, account)))


def _imports(layout: Layout, account: Account) -> Iterator[Import]:
    for role in _IMPORTING:
        if ACCOUNTS[role] != account:
            continue
        granted = permissions(layout, role, "*", ("*",))
        for local in map(_widened, granted.publish):
            own = f"{api(layout, role)}."
            subject = f"{JS_API}.{local.removeprefix(own)}" if local.startswith(own) else local
            yield Import("service", _serves(layout, subject), subject, local)
        for subject in map(_widened, granted.subscribe):
            if not subject.startswith("_INBOX.") and _serves(layout, subject) == "main":
                yield Import("stream", "main", subject, subject)


def exports(layout: Layout, account: Account) -> tuple[Import, ...]:
    """What others import from `account`, each subject once."""
    found: dict[tuple[str, str], Import] = {}
    for other in dict.fromkeys(ACCOUNTS.values()):
        for one in imports(layout, other):
            if one.exporter == account:
                found.setdefault((one.kind, one.subject), one)
    return tuple(found.values())


def shares(layout: Layout, account: Account, publics: Mapping[Account, str]) -> dict[str, Any]:
    """Both as NATS writes them. `publics` are the accounts' public keys."""
    given = [
        {
            "name": one.subject,
            "subject": one.subject,
            "type": one.kind,
            **(_answers(one) if one.kind == "service" else {}),
        }
        for one in exports(layout, account)
    ]
    taken = [
        {
            "name": one.local,
            "subject": one.subject,
            "account": publics[one.exporter],
            "local_subject": one.local,
            "type": one.kind,
        }
        for one in imports(layout, account)
    ]
    return {part: listed for part, listed in (("exports", given), ("imports", taken)) if listed}


def _answers(one: Import) -> dict[str, Any]:
    kind = "Stream" if one.streamed else "Singleton"
    return {"response_type": kind, "response_threshold": ANSWERS_S_MAX * 1_000_000_000}


def _widened(subject: str) -> str:
    """For any unit and any queue: a wildcard is a whole token."""
    return _ANY.sub("*", subject)


def _serves(layout: Layout, subject: str) -> Account:
    """Whose subject that is."""
    if subject in (layout.engine("*", "*"), layout.ping("*", "*")):
        return "executors"
    if subject in (layout.reply("*", "*"), layout.capacity()):
        return "workers"
    return "main"
