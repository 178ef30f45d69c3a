"""The verbs about what a cluster keeps: recover, backup, restore."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from mvmci.cli.options import (
    cluster_option,
    examples,
    json_option,
    make_state,
    option,
    run_async,
    say_loss,
    state_option,
)
from mvmci.jobs.summary import rfc3339
from mvmci.trust.known import find_cluster

if TYPE_CHECKING:
    from mvmci.deploy.backup import Report
    from mvmci.deploy.recover import Missing
    from mvmci.stores.nats import Part

GAPS_SHOWN = 20


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
