"""The verbs of trust: tickets, logging in with one, and revoking.

All but `login` and `ticket inspect` need the cluster's keys, and so the machine that called `up`.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
import msgspec

from mvmci.cli.complete import complete_at_file, complete_queue, complete_unit
from mvmci.cli.options import (
    Duration,
    cluster_option,
    examples,
    json_option,
    make_state,
    make_table,
    option,
    print_table,
    run_async,
    state_option,
)
from mvmci.cluster.identity import TICKET_ROLES, Identity, Ticket, TicketRole, encode_ticket
from mvmci.errors import StoreUnavailable, Usage
from mvmci.jobs.job import check_id
from mvmci.jobs.summary import rfc3339
from mvmci.system.text import one_line
from mvmci.trust.known import CLIENT, find_cluster

if TYPE_CHECKING:
    from mvmci.deploy.revoke import Kind
    from mvmci.deploy.state import Facts
    from mvmci.stores.nats import Cluster
    from mvmci.stores.nats.config import Config
    from mvmci.trust.authority import Authority
    from mvmci.trust.registry import TicketRecord

USES_MAX = 1_000
TTL = "1h"

ticket_argument = click.argument(
    "text", metavar="TICKET|@FILE|-", required=False, shell_complete=complete_at_file
)


@click.group("ticket")
def ticket_verb() -> None:
    """Create, inspect and revoke tickets: rights to join a cluster."""


@ticket_verb.command(
    "create",
    epilog=examples(
        "mvmci ticket create --output ticket            one worker, within an hour",
        "mvmci ticket create --role client --ttl 7d     for `mvmci login` on a laptop",
        "mvmci ticket create --queue gpu --uses 5",
    ),
)
@option(
    "--role",
    type=click.Choice(TICKET_ROLES),
    default="worker",
    show_default=True,
    help="The role that it gives.",
)
@option(
    "--queue",
    "queues",
    multiple=True,
    envvar="MVMCI_TICKET_QUEUE",
    shell_complete=complete_queue,
    help="Only for these queues. By default, those of the cluster.",
)
@option(
    "--uses",
    type=click.IntRange(1, USES_MAX),
    default=1,
    show_default=True,
    help="How many machines may use it.",
)
@option("--ttl", type=Duration(), default=TTL, show_default=True, help="How long it is valid.")
@option(
    "--output",
    envvar="MVMCI_TICKET_OUTPUT",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write it to this file, readable by you alone.",
)
@cluster_option
@state_option
@json_option
def create_verb(state: Path, cluster: str | None, as_json: bool, output: Path | None, **wanted: Any) -> int:
    """Create a ticket and print it. Whoever has it can use it: keep it like a password."""
    for queue in wanted["queues"]:
        check_id(queue, "queue name")

    from mvmci.system.ports import is_loopback

    async def work(there: Cluster, authority: Authority, facts: Facts) -> int:
        ticket, uses = await _create(there.config, authority, facts, **wanted), wanted["uses"]
        if output is not None:
            _write(output, encode_ticket(ticket))
        if as_json:
            where = {"file": str(output)} if output is not None else {"ticket": encode_ticket(ticket)}
            click.echo(msgspec.json.encode(_shown(ticket) | {"uses": uses} | where))
            return 0
        if output is None:
            click.echo(encode_ticket(ticket))
        machines = "one machine" if uses == 1 else f"{uses} machines"
        until = rfc3339(ticket.expires_at)
        click.echo(f"{ticket.id}: for {machines}, as {ticket.role}, until {until}", err=True)
        if all(is_loopback(urlsplit(url).hostname or "") for url in ticket.login.urls):
            click.echo(
                "warning: the broker listens on the loopback, so only this machine can use the ticket",
                err=True,
            )
        return 0

    return _with_keys(state, cluster, work)


async def _create(
    config: Config,
    authority: Authority,
    facts: Facts,
    *,
    role: TicketRole,
    queues: tuple[str, ...],
    uses: int,
    ttl: int,
) -> Ticket:
    from mvmci.store import ClusterSettings
    from mvmci.trust.registry import make_ticket, push_accounts

    if authority.external is None:  # what was rendered, and not brought up, may be told nowhere else
        await push_accounts(config, authority, facts.login)
    if role == "worker" and not queues:
        found = await config.get("settings")
        settings = (
            msgspec.json.decode(found.value, type=ClusterSettings) if found is not None else ClusterSettings()
        )
        queues = settings.queues
    return await make_ticket(
        config, authority, facts.outside, role=role, queues=queues, uses=uses, ttl_s=ttl / 1000
    )


def _write(path: Path, text: str) -> None:
    from mvmci.system.files import write_private

    try:
        write_private(path, f"{text}\n".encode())
    except OSError as error:
        raise Usage(f"{path} cannot be written: {error.strerror}") from None


@ticket_verb.command("ls", epilog=examples("mvmci ticket ls", "mvmci ticket ls --json"))
@cluster_option
@state_option
@json_option
def ls_verb(state: Path, cluster: str | None, as_json: bool) -> int:
    """List the tickets, newest first, without their secrets."""

    async def work(there: Cluster, authority: Authority, facts: Facts) -> int:
        from mvmci.trust.registry import read_tickets

        del authority, facts
        found = sorted((await read_tickets(there.config)).items(), key=lambda one: one[1].since, reverse=True)
        rows = [_row(ticket, record) for ticket, record in found]
        if as_json:
            click.echo(msgspec.json.encode(rows))
        elif rows:
            titles = ("ID", "ROLE", "QUEUES", "USED", "EXPIRES", "STATE")
            print_table(make_table(titles, map(_cells, rows)))
        else:
            click.echo("no tickets", err=True)
        return 0

    return _with_keys(state, cluster, work)


def _row(ticket: str, record: TicketRecord) -> dict[str, Any]:
    from mvmci.trust.registry import state_of

    return {
        "id": ticket,
        "role": record.role,
        "queues": record.queues,
        "uses": record.uses,
        "used": len(record.used_by),
        "created_at": rfc3339(record.since),
        "expires_at": rfc3339(record.expires_at or None),
        "revoked_at": rfc3339(record.revoked or None),
        "state": state_of(record),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    queues, used = ", ".join(row["queues"]) or "all", f"{row['used']} of {row['uses'] or 'any'}"
    return row["id"], row["role"], queues, used, row["expires_at"] or "never", row["state"]


@ticket_verb.command(
    "inspect", epilog=examples("mvmci ticket inspect @ticket", "mvmci ticket inspect - --json < ticket")
)
@ticket_argument
@json_option
def inspect_verb(text: str | None, as_json: bool) -> int:
    """Print what a ticket says, without its secrets. No cluster is asked."""
    from mvmci.trust.enrol.client import read_ticket

    shown = _shown(read_ticket(text))
    if as_json:
        click.echo(msgspec.json.encode(shown))
        return 0
    for name, value in shown.items():
        told = ", ".join(value) if isinstance(value, list | tuple) else value
        click.echo(f"{name:<11} {one_line(told or '-')}")
    return 0


def _shown(ticket: Ticket) -> dict[str, Any]:
    """A ticket without its secrets."""
    login = ticket.login
    return {
        "id": ticket.id,
        "cluster": ticket.cluster,
        "role": ticket.role,
        "queues": ticket.queues,
        "expires_at": rfc3339(ticket.expires_at or None),
        "urls": login.urls,
        "ca_sha256": hashlib.sha256(ssl.PEM_cert_to_DER_cert(login.ca)).hexdigest() if login.ca else None,
    }


@ticket_verb.command("revoke", epilog=examples("mvmci ticket revoke 3f09c2a1b7"))
@click.argument("ticket", metavar="ID")
@cluster_option
@state_option
def revoke_ticket_verb(ticket: str, state: Path, cluster: str | None) -> int:
    """Revoke a ticket. Units that joined with it stay: see `mvmci revoke`."""
    check_id(ticket, "ticket id")

    async def work(there: Cluster, authority: Authority, facts: Facts) -> int:
        from mvmci.trust.registry import revoke_ticket

        await revoke_ticket(there.config, authority, facts.login, ticket)
        click.echo(f"ticket {ticket} is revoked", err=True)
        return 0

    return _with_keys(state, cluster, work)


@click.command(
    "revoke",
    epilog=examples(
        "mvmci revoke worker-4", "mvmci revoke laptop", "mvmci revoke build-7 --host     all of its units"
    ),
)
@click.argument("name", metavar="NAME", shell_complete=complete_unit)
@option(
    "--host", "kind", flag_value="host", envvar="MVMCI_REVOKE_HOST", help="NAME is a host, and not a unit."
)
@option(
    "--unit", "kind", flag_value="unit", envvar="MVMCI_REVOKE_UNIT", help="NAME is a unit, and not a host."
)
@cluster_option
@state_option
def revoke_verb(name: str, kind: Kind | None, state: Path, cluster: str | None) -> int:
    """Revoke the credential of a unit or a client, or those of all units of a host. Their connections end at
    once.

    Their jobs go on elsewhere. A unit can come back with a new ticket, and one of `up` with `mvmci up`.
    """
    from mvmci.deploy.revoke import know_token, named
    from mvmci.deploy.state import ClusterState
    from mvmci.trust.authority import TOKEN

    async def work(there: Cluster, authority: Authority, facts: Facts) -> int:
        from mvmci.trust.registry import read_units, revoke_units

        deployed = ClusterState(state, there.layout.cluster).applied_deployment().units
        members = await there.store.presence.members()
        planes = authority.ledger.planes()
        found = named(name, deployed, await read_units(there.config), members, planes, kind)
        await revoke_units(there.config, authority, facts.login, found.units)
        for unit in found.units:
            await there.forget_member(unit)
        where, are = f" on {name}" if found.kind == "host" else "", "is" if len(found.units) == 1 else "are"
        click.echo(f"{', '.join(found.units)}{where} {are} revoked", err=True)
        if found.others:
            click.echo(
                f"warning: {', '.join(found.others)} there: no credential is known that can be revoked",
                err=True,
            )
        if facts.runtime == "ssh" and know_token(found.units, deployed):
            file = authority.folder / TOKEN
            click.echo(
                "warning: what executors ask for over HTTP is the same for all, and still counts\n"
                f"hint: `mvmci down`, removing {file}, and `mvmci up` make another one",
                err=True,
            )
        if fallen := planes.keys() & {*found.units}:
            click.echo(f"units that {', '.join(sorted(fallen))} let in or renewed are cut off too", err=True)
        return 0

    return _with_keys(state, cluster, work)


@click.command(
    "login",
    epilog=examples(
        "mvmci login @ticket            then every verb works from here",
        "ssh host mvmci ticket create --role client | mvmci login -",
    ),
)
@ticket_argument
@option(
    "--name",
    metavar="NAME",
    envvar="MVMCI_LOGIN_NAME",
    help="Your name in the cluster. By default, this host's.",
)
@state_option
def login_verb(text: str | None, name: str | None, state: Path) -> int:
    """Make this machine a client of a cluster, with a ticket of role client."""
    from mvmci.stores import open_cluster
    from mvmci.trust.enrol.client import check_cluster, check_role, enrol, read_ticket, remember_address

    if name is not None:
        check_id(name, "name")
    ticket = read_ticket(text)
    check_role(ticket, "client")
    check_cluster(state / ticket.cluster, ticket)
    make_state(state)

    async def main() -> Identity:
        path = state / ticket.cluster / CLIENT
        identity = await enrol(ticket, path, name=name or "")
        cluster = await open_cluster(identity, announce=False)  # what was there may have been revoked
        try:
            return remember_address(cluster.link, identity, path)
        finally:
            await cluster.close()

    identity = run_async(main())
    click.echo(f"this machine is {identity.unit}, a client of {identity.cluster}", err=True)
    return 0


def _with_keys(
    state: Path, cluster: str | None, work: Callable[[Cluster, Authority, Facts], Awaitable[int]]
) -> int:
    """Do `work` as an administrator of the cluster. Raises StoreUnavailable where its keys are not here."""
    from mvmci.deploy.operate import open_admin
    from mvmci.deploy.state import ClusterState
    from mvmci.trust.authority import Authority

    home = ClusterState(state, find_cluster(state, cluster))
    authority, facts = Authority.load(home.folder), home.facts()
    if facts is None:
        raise StoreUnavailable(f"cluster {home.cluster} was never brought up here", hint="`mvmci up` does it")

    async def main() -> int:
        async with open_admin(home) as there:
            return await work(there, authority, facts)

    return run_async(main())
