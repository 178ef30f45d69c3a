"""What mints the tokens of units: a key that signs, and the accounts of the cluster that believe it.

Where the keys of the cluster are, that is the key of its main account, which signs for every role. A
control plane has a key of its own for it. That one is believed for those who may enrol, in their accounts
and nowhere else, for as long as the accounts' tokens, which only the operator signs, name it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mvmci.cluster.broker import PAYLOAD_BYTES_MAX
from mvmci.cluster.identity import TICKET_ROLES, UnitRole
from mvmci.system import keys
from mvmci.trust import tokens

if TYPE_CHECKING:  # what they stand on loads the client of the broker
    from mvmci.trust.accounts import Account
    from mvmci.trust.permissions import Grantee

# The life of a token; it is renewed when a third of it is left. A machine that was off for longer needs a
# new ticket. What is revoked is cut off at once, so a long life is no danger.
UNIT_S = 30 * 24 * 3600
CLIENT_S = 30 * 24 * 3600
ASK_BYTES_MAX = 16 << 10  # of who has only a ticket


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Secret. `accounts` are their public keys; empty where the broker is not ours, and nothing is signed."""

    cluster: str
    accounts: Mapping[Account, str]
    seed: str = field(default="", repr=False)
    now: Callable[[], float] = time.time

    @property
    def external(self) -> bool:
        """Whether the one login to a broker of the user's own is every unit's."""
        return not self.accounts

    @property
    def issuer(self) -> str:
        """The public key that signs where the cluster's keys are, which is the name of the main account."""
        return self.accounts["main"]

    def signs_for(self, role: Grantee) -> bool:
        """Whether the broker would believe it."""
        return role in TICKET_ROLES or keys.public(self.seed) == self.issuer

    def mint(
        self,
        public: str,
        unit: str,
        role: Grantee,
        queues: Sequence[str],
        ttl_s: float | None,
        tags: tuple[str, ...] = (),
    ) -> str:
        """A token of `unit` for the key `public`; None is for ever. Empty where a login is lent."""
        from mvmci.stores.nats.layout import Layout
        from mvmci.trust.accounts import ACCOUNTS
        from mvmci.trust.permissions import permissions

        if self.external:
            return ""
        now, own, account = self.now(), keys.public(self.seed), self.accounts[ACCOUNTS[role]]
        tags = tags or tokens.tags("role", role, queues)
        return tokens.user(
            self.seed,
            public,
            unit,
            permissions(Layout(self.cluster), role, unit, queues),
            now,
            expires_at=math.ceil(now + ttl_s) if ttl_s is not None else 0,
            payload_max=ASK_BYTES_MAX if role == "bootstrap" else PAYLOAD_BYTES_MAX,
            tags=tags if own in self.accounts.values() else (*tags, tokens.origin_tag(self.issuer)),
            account="" if account == own else account,
        )

    def is_due(self, claims: tokens.Claims, role: Grantee) -> bool:
        """Whether a unit's token wants renewing: it is old, or does not say what this version needs."""
        from mvmci.stores.nats.layout import Layout
        from mvmci.trust.accounts import ACCOUNTS
        from mvmci.trust.permissions import permissions

        wanted = permissions(Layout(self.cluster), role, claims.name, claims.queues)
        allowed = claims.publish == wanted.publish and claims.subscribe == wanted.subscribe
        there = claims.account == self.accounts[ACCOUNTS[role]]
        return not (allowed and there) or claims.is_old(self.now())


def life_s(role: UnitRole) -> float | None:
    """How long a token of a unit is good. That of a control plane, for as long as its key is: nobody but
    who has the cluster's keys could renew it."""
    if role == "control-plane":
        return None
    return CLIENT_S if role == "client" else UNIT_S
