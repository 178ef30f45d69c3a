"""The verbs that make a cluster what its file says, and that look at it: up, plan, ps, down, drain."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

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
    log_to_stderr,
    make_state,
    make_table,
    option,
    print_table,
    run_async,
    say_loss,
    state_option,
)
from mvmci.config.quantity import rough_size
from mvmci.errors import EXIT_CHANGES, StoreUnavailable, TicketRefused, Usage
from mvmci.jobs.summary import rfc3339
from mvmci.system.tasks import readable
from mvmci.system.text import printable
from mvmci.trust.known import find_cluster

if TYPE_CHECKING:
    from mvmci.cluster.changes import Action, HostRow
    from mvmci.deploy.backup import Report
    from mvmci.deploy.plan import Plan
    from mvmci.deploy.recover import Missing
    from mvmci.deploy.state import ClusterState
    from mvmci.deploy.status import ClusterStatus, UnitRow
    from mvmci.deploy.up import Up
    from mvmci.runtimes.local.runtime import Local
    from mvmci.stores.nats import Part

T = TypeVar("T")
_LOOK_EVERY_S = 1.0
GAPS_SHOWN = 20
BUILD_SHOWN_CHARS = 7
HOST_TITLES = ("HOST", "ADDRESS", "CLOCK", "PYTHON", "SYSTEM", "DIRECTORY", "AWAY")
MARKS = {"start": "+", "restart": "~", "stop": "-", "wait": "?"}
READY_IN = "60s"
UNITS_GRACE = "1d"  # the supervisor counts, and cuts them short when it is time

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
    for line in _lines(plan):
        click.echo(line, err=as_json)
    if plan.disturbs and not options.yes and not detach and sys.stdin.isatty():
        await _confirm("go on?")
    view = _View(live=not detach and not as_json and sys.stdout.isatty(), err=as_json)
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


async def _detached(up: Up, state: ClusterState, view: _View, as_json: bool) -> int:
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


async def _foreground(up: Up, state: ClusterState, view: _View, as_json: bool) -> int:
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
    click.echo(sentence, err=True)


async def _watch(state: ClusterState, view: _View) -> None:
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


class _View:
    """Shows units while they change: a table on a terminal, else a line for each change."""

    def __init__(self, *, live: bool, err: bool) -> None:
        self._live: Any = None
        self._err = err
        self._states: dict[str, str] = {}
        self._pids: dict[str, int] = {}  # of those that are here, the last that was seen
        if live:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(highlight=False, markup=False), auto_refresh=False)

    def __enter__(self) -> _View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        text = printable(text)
        if self._live is not None:
            self._live.console.print(text)
        else:
            click.echo(text, err=self._err)

    def show(self, units: Sequence[UnitRow]) -> None:
        """How they are now."""
        if self._live is not None:
            self._live.update(_table(units), refresh=True)
            return
        for row in units:
            if row.pid is not None and self._pids.setdefault(row.name, row.pid) != row.pid:
                self._pids[row.name] = row.pid
                click.echo(f"{row.name} was started again", err=self._err)
            if self._states.get(row.name) != row.state:
                self._states[row.name] = row.state
                why = f": {row.reason}" if row.reason else ""
                click.echo(f"{row.name} is {row.state}{why}", err=self._err)
        for name in self._states.keys() - {row.name for row in units}:
            del self._states[name]
            click.echo(f"{name} is gone", err=self._err)


def _table(units: Sequence[UnitRow]) -> Any:
    rows = [_cells(row) for row in units]
    empty = {title for title in ("LABELS", "ADDRESS") if not any(cells[title] for cells in rows)}
    titles = [title for title in rows[0] if title not in empty] if rows else ["NAME"]
    return make_table(titles, ([cells[title] for title in titles] for cells in rows))


def _host_cells(row: HostRow) -> list[str]:
    skew = f"{row.skew_s:+.2f} s (± {row.skew_error_s:.2f})" if row.skew_s is not None else ""
    return [
        row.name,
        row.address,
        skew,
        row.python or "",
        row.system or "",
        row.directory or "",
        row.away or "",
    ]


def _cells(row: UnitRow) -> dict[str, str]:
    """What a table shows of a unit, by its column."""
    return {
        "NAME": row.name,
        "ROLE": row.role,
        "HOST": row.host,
        "STATE": row.state,
        "PID": str(row.pid or ""),
        "BUSY": f"{row.busy}/{row.slots}" if row.slots else "",
        "QUEUES": ",".join(row.queues),
        "LABELS": ",".join(f"{key}={value}" for key, value in sorted(row.labels.items())),
        "ISOLATION": row.isolation or "",
        "VERSION": "+".join(filter(None, (row.version, (row.build or "")[:BUILD_SHOWN_CHARS]))),
        "ADDRESS": row.address or "",
        "REASON": row.reason or "",
    }


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
        for line in _lines(plan):
            click.echo(line)
    return EXIT_CHANGES if exit_code and plan.changes else 0


async def _plan(root: Path, file: Path, runtime: str | None) -> Plan:
    from mvmci.deploy.plan import check_external, check_front, make_plan

    plan = await make_plan(root, file, runtime)
    async with plan.state:
        for warning in await check_external(plan):
            click.echo(warning, err=True)
        try:
            await check_front(plan)
        except Usage as away:  # the plan says what to put behind it
            click.echo(f"warning: {away.message}", err=True)
    return plan


def _lines(plan: Plan) -> list[str]:
    """What will be done, as people read it."""
    return [_line(action) for action in plan.changes]


def _line(action: Action) -> str:
    unit = action.unit
    if unit is None:
        return f"* {action.why}"
    at = f", at {unit.listen}" if unit.listen and action.kind != "stop" else ""
    what = f"{MARKS[action.kind]} {action.kind} {unit.name} on {unit.host}{at}"
    return f"{what}: {action.why}" if action.why else what


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
        print_table(_table(roster.units))
        if roster.hosts:
            click.echo()
            print_table(make_table(HOST_TITLES, map(_host_cells, roster.hosts)))
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


# ---- recover


@click.command(
    "recover",
    epilog=examples(
        "mvmci recover               what the store lost", "mvmci recover --yes         go on without it"
    ),
)
@option("--yes", is_flag=True, envvar="MVMCI_RECOVER_YES", help="Accept the loss, and take jobs again.")
@cluster_option
@json_option
@state_option
def recover_verb(yes: bool, cluster: str | None, as_json: bool, state: Path) -> int:
    """Print what a cluster lost that stands still because of that; with --yes, let it go on without."""
    from mvmci.deploy.operate import open_admin
    from mvmci.deploy.recover import accept, missing, read_damage
    from mvmci.deploy.state import ClusterState

    found = ClusterState(state, find_cluster(state, cluster))

    async def main() -> int:
        async with open_admin(found) as opened:
            told = await missing(opened, read_damage(found.folder))
            if as_json:
                click.echo(msgspec.json.encode(told))
            elif told is None:
                click.echo(f"{found.cluster} lost nothing that it knows of")
            else:
                _print_missing(told)
            if told is not None and yes:
                await accept(opened)
                click.echo(f"the loss is accepted: {found.cluster} takes jobs again", err=as_json)
            elif told is not None:
                click.echo("`mvmci recover --yes` lets the cluster go on without these", err=True)
        return 0

    return run_async(main())


def _print_missing(told: Missing) -> None:
    click.echo(f"noticed at {rfc3339(told.at)}:")
    for one in told.what:
        click.echo(f"  {one}")
    absent = sum(last - first + 1 for first, last in told.gaps)
    click.echo(f"sequences without a message: {absent}, of which retention removed {told.removed}")
    for first, last in told.gaps[:GAPS_SHOWN]:
        click.echo(f"  {first}–{last}" if last > first else f"  {first}")
    if len(told.gaps) > GAPS_SHOWN:
        click.echo(f"  and {len(told.gaps) - GAPS_SHOWN} more: --json has all of them")
    for job in told.jobs:
        click.echo(f"job {job}: nothing is left of it")
    for job, why in told.damaged.items():
        click.echo(f"job {job}: {why}")
    if not told.jobs and not told.damaged:
        click.echo("no job is known by name of which something is missing")


# ---- backup, restore


@click.command(
    "backup",
    epilog=examples(
        "mvmci backup /mnt/backup/demo            while jobs run; again adds what is new",
        "mvmci backup /mnt/backup/demo --keys     with the cluster's keys, which are secret",
    ),
)
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@option("--keys", is_flag=True, help="Copy the keys that are the cluster, too.")
@cluster_option
@json_option
@state_option
def backup_verb(folder: Path, keys: bool, cluster: str | None, as_json: bool, state: Path) -> int:
    """Copy what a cluster keeps into DIR, while it runs: journals, blobs, output, configuration."""
    from mvmci.deploy.backup import back_up
    from mvmci.deploy.operate import open_admin
    from mvmci.deploy.state import ClusterState

    found = ClusterState(state, find_cluster(state, cluster))

    async def main() -> Report:
        async with open_admin(found) as opened:
            loss = await opened.config.loss()
            say_loss(loss.what if loss is not None else ())
            return await back_up(opened, found, folder, keys=keys, say=_say_progress)

    report = run_async(main())
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        click.echo(f"{folder}: {_counts(report.messages)}; new: {_counts(report.new)}")
    return 0


@click.command(
    "restore",
    epilog=examples("mvmci restore /mnt/backup/demo     then: mvmci up topology.yaml"),
)
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@json_option
@state_option
def restore_verb(folder: Path, as_json: bool, state: Path) -> int:
    """Lay down what `backup` left in DIR, where there is no such cluster. `up` then starts it."""
    from mvmci.deploy.backup import restore

    make_state(state)
    report = restore(state, folder, say=_say_progress)
    if as_json:
        click.echo(msgspec.json.encode(report))
        return 0
    click.echo(f"{report.cluster} is as it was at {rfc3339(report.at)}: {report.jobs} jobs")
    for one in report.missing:
        click.echo(f"what came after is gone: {one}", err=True)
    file = folder / "topology.yaml"
    click.echo(f"next: mvmci up {file if file.exists() else 'FILE'}")
    return 0


def _say_progress(text: str) -> None:
    click.echo(text, err=True)


def _counts(messages: Mapping[Part, int]) -> str:
    return ", ".join(f"{count} of {part}" for part, count in messages.items() if count) or "nothing"


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

    if file is not None:
        cluster = read_file(file)[1].cluster
    found = ClusterState(state, find_cluster(state, cluster))
    ran = run_async(_closing(found, down(found, grace_s=grace / 1000, purge=purge, say=_say)))
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


# ---- topologies, supervise


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


@click.command("supervise", hidden=True)
@click.argument("verb", type=click.Choice(["run", "observe", "start", "stop"]), default="run")
@click.option("--cluster", required=True)
@click.option("--attached", type=int, help="End when the process of this number does.")
@click.option("--service", type=click.Choice(["auto", "system", "user", "none"]), default="none")
@click.option("--resume", is_flag=True, help="Go on with what was asked for before, and read nothing.")
@click.option("--take-over", is_flag=True, help="Go on with what this process ran as another program.")
@state_option
def supervise_verb(
    verb: str,
    cluster: str,
    attached: int | None,
    service: Literal["auto", "system", "user", "none"],
    resume: bool,
    take_over: bool,
    state: Path,
) -> int:
    """Keep the units of a cluster running: what `up` starts here, and leaves behind.

    JSON in, JSON out: what somebody can ask for who is on another machine. `run` reads what it begins with,
    `start` and `stop` what is to be done, and `observe` and these two print how the units are then.
    """
    from mvmci.runtimes.local.messages import (
        Desired,
        Handover,
        Start,
        SupervisorFiles,
        desired_by,
        read_desired,
    )
    from mvmci.runtimes.local.runtime import Local
    from mvmci.runtimes.local.service import FOR_SUPERVISOR, choose, notify
    from mvmci.runtimes.local.supervisor import supervise
    from mvmci.system.linux import die_with
    from mvmci.system.processes import clean_environment, this_program

    if attached is not None:
        die_with(attached, signal.SIGTERM)
    told = b"" if verb == "observe" or resume else sys.stdin.buffer.read()
    if verb != "run":
        click.echo(run_async(_ask(verb, Local(state, cluster, service=choose(service)), told)))
        return 0
    program = this_program()
    begin: Desired | Handover
    if take_over:
        begin = msgspec.json.decode(told, type=Handover)
    elif resume:
        begin = read_desired(SupervisorFiles(state / cluster))
    else:
        begin = desired_by(msgspec.json.decode(told, type=Start), program)
    if not begin.units:  # after a boot: all was stopped before it
        _say_ready()
        notify("READY=1")
        return 0
    log_to_stderr()
    env = {key: value for key, value in clean_environment(state).items() if key not in FOR_SUPERVISOR}
    env["MVMCI_GRACE"] = UNITS_GRACE
    options = () if attached is None else ("--attached", str(attached))
    running = supervise(
        state / cluster, begin, program, env, ready=_say_ready, options=options, kept=attached is None
    )
    asyncio.run(running)
    return 0


@click.command("host", hidden=True)
@click.option("--cluster", required=True)
@click.option("--service", type=click.Choice(["auto", "system", "user", "none"]), default="auto")
@state_option
def host_verb(cluster: str, service: Literal["auto", "system", "user", "none"], state: Path) -> int:
    """Do what an `up` on another machine asks for, while its channel of ssh is open. JSON in, JSON out."""
    from mvmci.jobs.job import check_id
    from mvmci.runtimes.local.agent import serve_stdio
    from mvmci.runtimes.local.runtime import Local
    from mvmci.runtimes.local.service import choose

    make_state(state)
    asyncio.run(serve_stdio(Local(state, check_id(cluster, "cluster name"), service=choose(service))))
    return 0


async def _ask(verb: str, here: Local, told: bytes) -> bytes:
    from mvmci.runtimes.local.messages import Report, Start, Stop

    if verb == "start":
        await here.start(msgspec.json.decode(told, type=Start).units)
    elif verb == "stop":
        stop = msgspec.json.decode(told, type=Stop)
        await here.stop(stop.names, stop.grace_s)
    return msgspec.json.encode(Report(units=await here.observe()))


def _say_ready() -> None:
    """Tell who started us, and let go of that pipe."""
    os.write(sys.stdout.fileno(), b"ready\n")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
