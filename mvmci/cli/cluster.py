"""The verbs that make a cluster what its file says, and that look at it: up, plan, ps, down, drain."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from mvmci.cli.complete import complete_unit
from mvmci.cli.options import (
    Duration,
    Share,
    cluster_option,
    examples,
    grace_option,
    json_option,
    make_state,
    option,
    print_table,
    run_async,
    say_loss,
    state_option,
)
from mvmci.cli.view import View, host_table, plan_lines, unit_table
from mvmci.config.quantity import rough_size
from mvmci.errors import EXIT_CHANGES, StoreUnavailable, TicketRefused, Usage
from mvmci.system.tasks import readable
from mvmci.system.text import one_line
from mvmci.trust.known import find_cluster

if TYPE_CHECKING:
    from mvmci.deploy.plan import Plan
    from mvmci.deploy.state import ClusterState
    from mvmci.deploy.status import ClusterStatus
    from mvmci.deploy.up import Up

T = TypeVar("T")
_LOOK_EVERY_S = 1.0
READY_IN = "60s"

file_argument = click.argument("file", type=click.Path(path_type=Path))
runtime_option = option("--runtime", metavar="R", help="Instead of the file's: local, compose or ssh.")
accept_option = option(
    "--accept-new-host-keys",
    is_flag=True,
    help="Take, and record, the key of a host that has none yet.",
)


# ---- up


@click.command(
    "up",
    epilog=examples(
        "mvmci up topology.yaml                 start a cluster, which Ctrl-C brings down, or change one",
        "mvmci up topology.yaml --detach        return when a real job has run",
        "mvmci up topology.yaml --detach --json | jq -r .ticket_file",
    ),
)
@file_argument
@runtime_option
@accept_option
@option("--detach", is_flag=True, help="Leave it running, and return when it is ready.")
@option("--within", type=Duration(), default=READY_IN, show_default=True, help="To be ready in, each step.")
@option(
    "--batch",
    type=Share(),
    default="20%",
    show_default=True,
    envvar="MVMCI_UP_BATCH",
    help="On how many hosts at once units that run are started again, after a first one.",
)
@option("--yes", is_flag=True, help="Do not ask before something that runs is stopped.")
@json_option
@state_option
def up_verb(file: Path, state: Path, within: int, **options: Any) -> int:
    """Make the cluster what FILE says: start it, or change what has changed. Twice is once."""
    make_state(state)
    return run_async(_up(file, state, _UpOptions(within_s=within / 1000, **options)))


@dataclass(frozen=True, kw_only=True)
class _UpOptions:
    """How `up` is done."""

    runtime: str | None
    accept_new_host_keys: bool
    detach: bool
    within_s: float
    batch: float
    yes: bool
    as_json: bool


async def _up(file: Path, root: Path, options: _UpOptions) -> int:
    from mvmci.deploy.plan import read_file
    from mvmci.deploy.state import ClusterState
    from mvmci.deploy.up import Overtaken

    while True:
        async with ClusterState(root, read_file(file)[1].cluster) as state:
            try:
                return await _up_once(state, file, options)
            except Overtaken as overtaken:
                click.echo(f"{overtaken.message}: planned again", err=True)


async def _up_once(state: ClusterState, file: Path, options: _UpOptions) -> int:
    from mvmci.deploy.plan import check_external, check_front, make_plan
    from mvmci.deploy.up import Up

    detach, as_json = options.detach, options.as_json
    accept = options.accept_new_host_keys
    plan = await make_plan(state.root, file, options.runtime, state=state, accept_new_host_keys=accept)
    state.check_free()
    for warning in await check_external(plan):
        click.echo(warning, err=True)
    await check_front(plan)
    if not plan.changes and await _all_ready(plan, as_json):
        return 0
    for line in plan_lines(plan):
        click.echo(line, err=as_json)
    if plan.disturbs and not options.yes and not detach and sys.stdin.isatty():
        await _confirm("go on?")
    view = View(live=not detach and not as_json and sys.stdout.isatty(), err=as_json)
    up = Up(
        plan,
        say=view.say,
        show=view.show,
        attached=not detach,
        within_s=options.within_s,
        batch=options.batch,
    )
    return await (_detached if detach else _foreground)(up, state, view, as_json)


async def _closing(state: ClusterState, work: Awaitable[T]) -> T:
    """What `work` comes to, and then no connection to the hosts of `state`."""
    async with state:
        return await work


async def _confirm(question: str) -> None:
    """Ask before something is stopped; anything but yes is No. Raises click.Abort.

    The answer is awaited, and not read for, so that a signal ends the verb at once.
    """
    click.echo(f"{question} [y/N] ", nl=False, err=True)
    await readable(sys.stdin.fileno())
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise click.Abort


async def _detached(up: Up, state: ClusterState, view: View, as_json: bool) -> int:
    """Bring it up, and leave it."""
    try:
        with view:
            roster = await up.run()
    except asyncio.CancelledError:
        if up.begun:
            click.echo("interrupted: the same command goes on, `mvmci down` stops what runs", err=True)
        raise
    _tell_ready(state, roster, as_json, proved=up.proved)
    return 0


async def _all_ready(plan: Plan, as_json: bool) -> bool:
    """Say that there is nothing to do, where that is so."""
    from mvmci.deploy.operate import look
    from mvmci.deploy.status import OTHER_BUILD
    from mvmci.trust.client import client_of

    state = plan.state
    try:
        roster = await look(state, lambda: client_of(state.folder))
    except (StoreUnavailable, TicketRefused):
        return False
    planned = {unit.name for unit in plan.deployment.units}
    if not all(row.is_settled for row in roster.units if row.name in planned):
        return False
    if any(row.reason == OTHER_BUILD for row in roster.units):
        return False  # that machine is to find this program
    drained = [row.name for row in roster.units if row.name in planned and row.state != "ready"]
    but = f", but {', '.join(drained)}: drained by `mvmci drain`" if drained else ""
    click.echo(f"nothing to change: {len(planned)} units of {state.cluster} are ready{but}", err=as_json)
    if as_json:
        _print_json(state, roster)
    return True


async def _foreground(up: Up, state: ClusterState, view: View, as_json: bool) -> int:
    """Bring it up, show how it is, and bring it down at the end: but what ran before goes on."""
    try:
        with view:
            roster = await up.run()
            if as_json:
                _print_json(state, roster)
            else:
                ends = "ends this view: it ran before, and goes on" if up.adopts else "brings it down"
                view.say(f"{state.cluster} is ready; Ctrl-C {ends}")
            await _watch(state, view)
    except BaseException:
        if up.begun and up.adopts:
            click.echo(f"{state.cluster} goes on; `mvmci down` stops it", err=True)
        elif up.begun:
            click.echo(f"bringing {state.cluster} down; again to hurry", err=True)
            from mvmci.deploy.operate import stop

            await stop(state, say=_say)
        raise
    click.echo(f"{state.cluster} was brought down", err=True)
    return 0


def _say(sentence: str) -> None:
    click.echo(one_line(sentence), err=True)


async def _watch(state: ClusterState, view: View) -> None:
    """Show how the units are, until none of them is kept running any more."""
    from mvmci.deploy.operate import look
    from mvmci.trust.client import client_of

    ended = asyncio.create_task(_until_none(state))
    try:
        while not ended.done():
            with suppress(StoreUnavailable, TicketRefused):
                view.show((await look(state, lambda: client_of(state.folder))).units)
            await asyncio.wait([ended], timeout=_LOOK_EVERY_S)
    finally:
        ended.cancel()


async def _until_none(state: ClusterState) -> None:
    async for seen in state.runtime().watch():
        if not seen:
            return


def _tell_ready(state: ClusterState, roster: ClusterStatus, as_json: bool, *, proved: bool) -> None:
    if as_json:
        _print_json(state, roster)
        return
    click.echo(f"{state.cluster} is ready{': a job has run' if proved else ''}")
    steps = {
        "mvmci submit MODULE --wait": "run something on it",
        "mvmci ps": "see how it is",
        "mvmci down": "stop it; its data stays",
        f"mvmci worker --join {shlex.quote(f'@{state.ticket}')}": "add a worker, once, within the hour",
    }
    doors = (
        [unit for unit in state.applied_deployment().units if unit.listen]
        if roster.runtime == "local"
        else []
    )
    if doors:
        steps[f"curl http://{doors[-1].listen}/openapi.json"] = "what HTTP there can do"
    click.echo("\nnext:")
    for verb, why in steps.items():
        click.echo(f"  {verb:<{max(map(len, steps))}}   {why}")


def _print_json(state: ClusterState, roster: ClusterStatus) -> None:
    facts = state.facts()
    more = {
        "ticket_file": str(state.ticket) if state.ticket.exists() else None,
        "url": facts.outside.urls[0] if facts is not None else None,
    }
    click.echo(json.dumps(msgspec.to_builtins(roster) | more))


# ---- plan


@click.command("plan", epilog=examples("mvmci plan topology.yaml", "mvmci plan topology.yaml --exit-code"))
@file_argument
@runtime_option
@option("--exit-code", is_flag=True, help=f"Exit with {EXIT_CHANGES} if `up` would change something.")
@json_option
@state_option
def plan_verb(file: Path, runtime: str | None, exit_code: bool, as_json: bool, state: Path) -> int:
    """What `up` would do with FILE. Nothing is changed."""
    plan = run_async(_plan(state, file, runtime))
    if as_json:
        changes = [
            {"kind": one.kind, "why": one.why} | msgspec.to_builtins(one.unit)
            for one in plan.changes
            if one.unit is not None
        ]
        settings = [one.why for one in plan.changes if one.unit is None]
        told = {"cluster": plan.state.cluster, "engine": plan.deployment.engine, "changes": changes}
        click.echo(json.dumps(told | {"settings": settings}))
    elif not plan.changes:
        click.echo("nothing to change")
    else:
        for line in plan_lines(plan):
            click.echo(line)
    return EXIT_CHANGES if exit_code and plan.changes else 0


async def _plan(root: Path, file: Path, runtime: str | None) -> Plan:
    from mvmci.deploy.plan import check_external, check_front, make_plan, read_file
    from mvmci.deploy.state import ClusterState

    async with ClusterState(root, read_file(file)[1].cluster) as state:
        plan = await make_plan(root, file, runtime, state=state)
        for warning in await check_external(plan):
            click.echo(warning, err=True)
        try:
            await check_front(plan)
        except Usage as away:  # the plan says what to put behind it
            click.echo(f"warning: {away.message}", err=True)
    return plan


# ---- ps


@click.command("ps", epilog=examples("mvmci ps", "mvmci ps --json | jq '.units[] | select(.busy > 0)'"))
@cluster_option
@json_option
@state_option
def ps_verb(cluster: str | None, as_json: bool, state: Path) -> int:
    """The units of a cluster, those that joined by hand too, and how they are."""
    from mvmci.deploy.operate import look
    from mvmci.deploy.state import ClusterState
    from mvmci.trust.client import client_of

    found = ClusterState(state, find_cluster(state, cluster))
    roster = run_async(_closing(found, look(found, lambda: client_of(found.folder))))
    if as_json:
        click.echo(msgspec.json.encode(roster))
    else:
        print_table(unit_table(roster.units))
        if roster.hosts:
            click.echo()
            print_table(host_table(roster.hosts))
        if roster.store:
            click.echo(f"\nstore: {_rooms(roster)}")
    say_loss(roster.loss)
    if roster.trouble:
        click.echo(f"warning: {roster.trouble}: make room, then it goes on by itself", err=True)
    return 0


def _rooms(roster: ClusterStatus) -> str:
    parts = (
        f"{part} {rough_size(room.used)} of {rough_size(room.most)} ({room.used * 100 // room.most} %)"
        for part, room in roster.store.items()
    )
    return f"{', '.join(parts)}; `broker.store` is 45 % journals, 25 blobs, 15 output, 5 hints"


# ---- down


@click.command("down", epilog=examples("mvmci down", "mvmci down topology.yaml --purge"))
@click.argument("file", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@grace_option
@option("--purge", is_flag=True, help="Cut jobs short, and remove the cluster with all its data.")
@cluster_option
@state_option
def down_verb(file: Path | None, grace: int, purge: bool, cluster: str | None, state: Path) -> int:
    """Stop all that `up` started. What jobs left stays, and the next `up` goes on with it."""
    from mvmci.deploy.operate import down
    from mvmci.deploy.plan import read_file
    from mvmci.deploy.state import ClusterState

    lost = {}
    if file is not None:
        there = read_file(file)[1]
        cluster, lost = there.cluster, {name: one for name, one in there.hosts.items() if one.state == "lost"}
    found = ClusterState(state, find_cluster(state, cluster))
    ran = run_async(_closing(found, down(found, grace_s=grace / 1000, purge=purge, lost=lost, say=_say)))
    click.echo(f"{found.cluster} is down" if ran else f"nothing of {found.cluster} was running")
    if purge:
        click.echo(f"{found.folder} was removed")
    return 0


# ---- drain


@click.command("drain", epilog=examples("mvmci drain worker-2", "mvmci drain worker-2 --undo"))
@click.argument("name", metavar="NAME", shell_complete=complete_unit)
@option("--undo", is_flag=True, help="Let it take jobs again.")
@cluster_option
@state_option
def drain_verb(name: str, undo: bool, cluster: str | None, state: Path) -> int:
    """Let a worker or an executor take no more jobs, and wait until it has none. It stays, also restarted."""
    from mvmci.deploy.operate import drain
    from mvmci.deploy.state import ClusterState

    found = ClusterState(state, find_cluster(state, cluster))
    run_async(_closing(found, drain(found, name, undo=undo)))
    click.echo(f"{name} takes jobs again" if undo else f"{name} is drained: it has no job, and takes none")
    return 0


# ---- topologies


@click.command("topologies", epilog=examples("mvmci topologies"))
@json_option
def topologies_verb(as_json: bool) -> int:
    """The accesses that a cluster file can name, and what each is for."""
    from mvmci.deploy.access import accesses

    found = {access.name: access.about for access in accesses().values()}
    if as_json:
        click.echo(json.dumps([{"name": name, "about": about} for name, about in found.items()]))
        return 0
    for name, about in found.items():
        click.echo(f"{name:<{max(map(len, found))}}  {about}")
    return 0
