"""The program that a cluster runs, for machines that joined it: kept in its store, signed by its key.

`up` offers its own file, one for each architecture: the bytes are a blob, and the key `program.<machine>` of
CONFIG says which, under the signature of the key that signs the tokens of units. A unit knows that key by
its own token, so neither the broker nor a control plane can offer it another program. An earlier offer, put
back as it was signed, is refused by whoever took a later one. Its blob is named by nothing and goes as others
do.

    <cluster>/program.json    the offer that this machine took last
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mvmci.cluster.identity import Identity
from mvmci.errors import TicketRefused, Usage
from mvmci.jobs.job import Time
from mvmci.jobs.summary import rfc3339
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.config import Config
from mvmci.system import keys
from mvmci.system.files import write_private
from mvmci.trust import tokens

if TYPE_CHECKING:  # every unit looks at what is offered, and few offer it
    from mvmci.trust.authority import Authority

OFFERS = "program"
_TAKEN = "program.json"
_DOMAIN = b"mvmci program\0"  # the key signs tokens, too, which begin otherwise


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A program. `digest` is the name of its blob, which is that of the file."""

    cluster: str
    machine: str  # as `uname -m` says
    version: str
    digest: str
    at: Time


class _Signed(msgspec.Struct, frozen=True, kw_only=True):
    offer: str  # JSON, byte by byte as it was signed
    signature: bytes


_WHO_ELSE = "have `mvmci up` offer it anew, and see who else can write to the cluster's CONFIG"
_signed = msgspec.json.Decoder(_Signed)
_offers = msgspec.json.Decoder(Offer)


async def is_wanted(config: Config) -> bool:
    """Whether machines joined that run jobs: those of `up` get their program from it."""
    from mvmci.trust.registry import read_units

    units = (await read_units(config)).values()
    return any(one.ticket and not one.revoked and one.role in ("worker", "executor") for one in units)


async def offer(
    cluster: Cluster, authority: Authority, file: Path, *, machine: str, version: str, at: int
) -> None:
    """Have the machines of that architecture find `file`. Raises StoreFull, StoreUnavailable, Conflict."""
    digest = await cluster.blobs.put_file(file)
    there = await cluster.config.get(_key(machine))
    try:
        known = _read(there.value if there is not None else b"", authority.issuer)
    except TicketRefused:
        known = None  # it is put right
    if known is not None and known.digest == digest:
        return
    at = max(at, known.at + 1) if known is not None else at  # our clock may have been set back
    made = Offer(cluster=authority.cluster, machine=machine, version=version, digest=digest, at=at)
    text = msgspec.json.encode(made)
    signature = keys.sign(authority.account, _DOMAIN + text)
    value = msgspec.json.encode(_Signed(offer=text.decode(), signature=signature))
    await cluster.config.put(_key(machine), value, expect=there.revision if there is not None else 0)


async def find_offer(config: Config, identity: Identity, machine: str) -> Offer | None:
    """What the cluster of `identity` offers a machine of that architecture; None where it offers nothing.

    Raises TicketRefused for what its key did not sign, Usage where the broker is not its own, and nothing is
    signed.
    """
    claims = tokens.peek(identity.login.jwt)
    if claims is None:
        raise Usage(
            f"the broker of cluster {identity.cluster} is not mvmci's, so nothing there is signed",
            hint="copy mvmci.pyz from the machine that called `mvmci up`",
        )
    there = await config.get(_key(machine))
    if there is None:
        return None
    found = _read(there.value, claims.origin)
    if (found.cluster, found.machine) != (identity.cluster, machine):
        raise _refused()
    return found


def check_order(offer: Offer, folder: Path) -> None:
    """Raises TicketRefused where this machine, whose `folder` of the cluster that is, took a later offer."""
    try:
        taken = _offers.decode((folder / _TAKEN).read_bytes())
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return
    if offer.at < taken.at:
        raise TicketRefused(
            f"the cluster offers a program of {rfc3339(offer.at)}, and this machine had one of "
            f"{rfc3339(taken.at)} from it",
            hint=_WHO_ELSE,
        )


def keep_taken(offer: Offer, folder: Path) -> None:
    """Keep in mind that this machine took `offer`. Raises OSError."""
    write_private(folder / _TAKEN, msgspec.json.encode(offer))


async def machines(config: Config) -> list[str]:
    """The architectures for which there is an offer."""
    return sorted(key.partition(".")[2] for key in await config.all(OFFERS))


def _key(machine: str) -> str:
    return f"{OFFERS}.{machine}"


def _read(value: bytes, issuer: str) -> Offer:
    try:
        signed = _signed.decode(value)
        if keys.verify(issuer, _DOMAIN + signed.offer.encode(), signed.signature):
            return _offers.decode(signed.offer)
    except (msgspec.DecodeError, UnicodeError):
        pass
    raise _refused()


def _refused() -> TicketRefused:
    return TicketRefused(
        "the program that the cluster offers is not signed by its key",
        hint=_WHO_ELSE,
    )
