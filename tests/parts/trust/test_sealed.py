"""What containers are given: tickets for ever, a broker without seeds, and what was revoked stays so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.identity import Login, decode
from mvmci.errors import Usage
from mvmci.trust import sealed, tokens
from mvmci.trust.authority import Authority
from mvmci.trust.registry import TicketRecord
from mvmci.trust.sealed import BrokerConfig, ControlPlaneConfig, for_broker, for_plane, ticket_for

INSIDE = Login(urls=("tls://broker:4222",), ca="CA")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "demo")


def test_a_ticket_is_for_any_number_of_uses_and_for_ever(authority: Authority) -> None:
    text, record = ticket_for(authority, "worker", ["default"], INSIDE, "")
    ticket = decode(text)
    claims = tokens.read(ticket.login.jwt, authority.issuer)
    assert claims is not None
    assert (ticket.expires_at, claims.exp, record.expires_at, record.uses) == (0, 0, 0, 0)
    assert (record.role, record.queues, record.key) == ("worker", ("default",), claims.sub)


def test_a_ticket_that_fits_stays(authority: Authority) -> None:
    text, record = ticket_for(authority, "worker", ["default"], INSIDE, "")
    assert ticket_for(authority, "worker", ["default"], INSIDE, text) == (text, record)


@pytest.mark.parametrize(
    "change",
    [
        {"queues": ["default", "gpu"]},
        {"role": "executor"},
        {"login": Login(urls=("tls://elsewhere:4222",), ca="CA")},
        {"login": Login(urls=INSIDE.urls, ca="another")},
    ],
)
def test_one_that_does_not_is_replaced(change: dict[str, Any], authority: Authority) -> None:
    same: dict[str, Any] = {"role": "worker", "queues": ["default"], "login": INSIDE}
    text, _ = ticket_for(authority, **same, there="")
    assert ticket_for(authority, **(same | change), there=text)[0] != text


@pytest.mark.parametrize("there", ["", "nonsense", "mvmci1_AAAA"])
def test_nonsense_is_replaced(there: str, authority: Authority) -> None:
    assert decode(ticket_for(authority, "worker", ["default"], INSIDE, there)[0]).cluster == "demo"


def test_a_ticket_of_other_keys_is_replaced(authority: Authority, tmp_path: Path) -> None:
    """A cluster that was purged and made again has other keys, and an old folder may lie about."""
    text, _ = ticket_for(Authority.create(tmp_path / "other" / "demo"), "worker", ["default"], INSIDE, "")
    assert ticket_for(authority, "worker", ["default"], INSIDE, text)[0] != text


def test_a_broker_gets_no_seed(authority: Authority) -> None:
    told = for_broker(authority, BrokerSettings(name="demo"), "/run/secrets")
    text = msgspec.json.encode(told).decode()
    assert not [seed for seed in (authority.operator, authority.account, authority.system) if seed in text]
    assert told.guard().key == Path("/run/secrets/broker.key")
    assert authority.issuer in told.accounts


def test_a_control_plane_gives_out_what_the_machine_with_the_keys_would(authority: Authority) -> None:
    plane = for_plane(authority, INSIDE, {}, None)
    there = plane.authority()
    assert (there.issuer, there.cluster, there.system) == (authority.issuer, "demo", authority.system)


def test_what_stands_in_the_registry_stays() -> None:
    """It says who used a ticket, and whether it was revoked."""
    made = TicketRecord(role="worker", uses=0)
    assert sealed._first(made, None) == made
    assert sealed._first(made, msgspec.structs.replace(made, revoked=1)) is None


@pytest.mark.parametrize("kind", [BrokerConfig, ControlPlaneConfig])
@pytest.mark.parametrize("data", [None, b"", b"{}", b"\xff"])
def test_a_file_that_is_not_what_was_rendered_is_refused(
    kind: Callable[..., Any], data: bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / "broker.json"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(Usage, match="cannot be read"):
        sealed.read(file, kind)
