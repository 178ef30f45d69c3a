"""A broker of the user's own: one login for all. Names, tickets and their uses count all the same."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mvmci.cluster.identity import Login
from mvmci.errors import TicketRefused, Usage
from mvmci.stores import open_cluster
from mvmci.stores.nats import Cluster, remove
from mvmci.trust.authority import Authority, read_identity
from mvmci.trust.enrol.client import enrol, renew_always
from mvmci.trust.enrol.server import EnrolmentServer
from mvmci.trust.known import identity_path
from mvmci.trust.registry import AccountTokens, make_ticket, read_units, revoke_ticket, revoke_units
from tests.harness.broker import ensure

STORE_BYTES = 64 << 20


@pytest.fixture
async def external(tmp_path: Path, broker_url: str) -> AsyncIterator[tuple[Authority, Login, Cluster]]:
    name, login = f"t-{secrets.token_hex(4)}", Login(urls=(broker_url,))
    authority = Authority.of_external(tmp_path / name, login)
    await ensure(login, name, store_bytes=STORE_BYTES)
    path = identity_path(tmp_path, name, "control-plane-1")
    identity = authority.identity("control-plane-1", "control-plane", (), login, path)
    cluster = await open_cluster(identity, maintains=True)
    enrolment = EnrolmentServer(cluster, authority.signer, AccountTokens(operator=""))
    await enrolment.start()
    yield authority, login, cluster
    await enrolment.close()
    await cluster.close()
    await remove(login, name)


async def test_a_machine_enrols_and_gets_the_login_of_all(
    external: tuple[Authority, Login, Cluster], tmp_path: Path
) -> None:
    authority, login, cluster = external
    ticket = await make_ticket(cluster.config, authority, login, role="worker", queues=("q",), ttl_s=60)
    path = tmp_path / "m0" / "identity.json"
    identity = await enrol(ticket, path, name="box")
    assert (identity.unit, identity.role, identity.queues) == ("box", "worker", ("q",))
    assert identity.login == login
    assert await enrol(ticket, path, name="box") == identity == read_identity(path)
    assert (await read_units(cluster.config))["box"].queues == ("q",)
    with pytest.raises(TicketRefused, match="used up"):
        await enrol(ticket, tmp_path / "m1" / "identity.json")
    await renew_always(cluster.link, identity, path)  # there is nothing to renew: it returns


async def test_a_ticket_can_be_revoked_and_a_machine_cannot(
    external: tuple[Authority, Login, Cluster], tmp_path: Path
) -> None:
    authority, login, cluster = external
    ticket = await make_ticket(cluster.config, authority, login, role="worker", queues=("q",), ttl_s=60)
    await revoke_ticket(cluster.config, authority, login, ticket.id)
    with pytest.raises(TicketRefused, match="was revoked"):
        await enrol(ticket, tmp_path / "m0" / "identity.json")
    with pytest.raises(Usage, match="is not mvmci's"):
        await revoke_units(cluster.config, authority, login, ["control-plane-1"])
