"""The verb `upgrade`: the cluster's own program in the place of this one."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import click

from mvmci import __version__
from mvmci.cli.options import cluster_option, examples, option, run_async, state_option
from mvmci.cluster.identity import Identity
from mvmci.errors import EXIT_CHANGES, NotFound, TicketRefused, Usage
from mvmci.stores import open_cluster
from mvmci.stores.nats import Cluster
from mvmci.system.files import sync_folder
from mvmci.system.processes import program_digest, runs_zipapp
from mvmci.trust import program
from mvmci.trust.authority import read_identity
from mvmci.trust.client import client_of
from mvmci.trust.known import find_cluster

START_S = 120
RESTART = "start the unit again: `systemctl restart` of its service, or what you started it with"


@click.command("upgrade", epilog=examples("mvmci upgrade --check", "mvmci upgrade", "mvmci upgrade --undo"))
@option("--check", is_flag=True, help=f"Only say whether there is another build; {EXIT_CHANGES} if there is.")
@option(
    "--undo",
    is_flag=True,
    envvar="MVMCI_UPGRADE_UNDO",
    help="Put the file back that the last upgrade replaced.",
)
@cluster_option
@state_option
def upgrade_verb(check: bool, undo: bool, cluster: str | None, state: Path) -> int:
    """Put the cluster's program in the place of this one, on a machine that joined by ticket.

    It comes from the cluster's store, by the digest that the cluster's key signed.
    """
    if not runs_zipapp():
        raise Usage(
            "this is a source tree", hint="`upgrade` replaces the file mvmci.pyz that it is called from"
        )
    file = Path(os.path.realpath(sys.argv[0]))
    try:
        if undo:
            _put_back(file)
            click.echo(f"{file} is what it was; {RESTART}", err=True)
            return 0
        folder = state / find_cluster(state, cluster)
        return run_async(_upgrade(file, folder, check=check))
    except OSError as error:
        raise Usage(
            f"{file} cannot be replaced: {error.strerror}", hint="do this as the user whose file that is"
        ) from None


def _identity(folder: Path) -> Identity:
    """Who this machine is to the cluster: its client, else any of its units. Raises TicketRefused."""
    with contextlib.suppress(TicketRefused):
        return client_of(folder)
    for path in sorted(folder.glob("units/*/identity.json")):
        if (found := read_identity(path)) is not None:
            return found
    raise TicketRefused(f"this machine is nobody to {folder.name}", hint="join it with a ticket")


async def _upgrade(file: Path, folder: Path, *, check: bool) -> int:
    identity = _identity(folder)
    cluster = await open_cluster(identity, announce=False)
    try:
        offer = await _offer(cluster, identity)
        program.check_order(offer, folder)
        if offer.digest == f"sha256:{program_digest()}":
            click.echo(f"this is the build of {identity.cluster}: {offer.version}, {offer.digest}", err=True)
            return 0
        click.echo(
            f"{identity.cluster} runs {offer.version}, {offer.digest}; "
            f"this is {__version__}, sha256:{program_digest()}",
            err=True,
        )
        if check:
            return EXIT_CHANGES
        await _replace(cluster, file, offer)
        program.keep_taken(offer, folder)
    finally:
        await cluster.close()
    click.echo(f"{file} is that now, and {_old(file).name} what it was; {RESTART}", err=True)
    return 0


async def _offer(cluster: Cluster, identity: Identity) -> program.Offer:
    machine = platform.machine()
    offer = await program.find_offer(cluster.config, identity, machine)
    if offer is not None:
        return offer
    others = await program.machines(cluster.config)
    if others:
        raise NotFound(
            f"{identity.cluster} offers its program for {', '.join(others)}, and this machine is {machine}",
            hint=f"build it on a {machine} machine: ./just zipapp",
        )
    raise NotFound(
        f"{identity.cluster} offers no program",
        hint="`mvmci up` does, once a machine has joined: call it again there",
    )


async def _replace(cluster: Cluster, file: Path, offer: program.Offer) -> None:
    """Have the program at `file`, whole or not at all, once it has shown that it starts here."""
    new = file.with_name(f".{file.name}.new")
    new.unlink(missing_ok=True)
    try:
        await cluster.blobs.fetch(offer.digest, new)
        new.chmod(file.stat().st_mode)
        with new.open("rb") as written:
            os.fsync(written.fileno())
        _try(new, offer)
        old = file.with_name(f".{file.name}.old")
        old.unlink(missing_ok=True)
        os.link(file, old)
        old.replace(_old(file))
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
    sync_folder(file.parent)


def _try(new: Path, offer: program.Offer) -> None:
    command = [sys.executable, "-I", str(new), "version"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    except subprocess.TimeoutExpired:
        said = f"it did not answer in {START_S:g} s"
    else:
        said = (done.stderr.strip().splitlines() or ["nothing"])[0] if done.returncode else ""
    if said:
        raise Usage(f"{offer.version} does not start on this machine, and nothing was changed: {said}")


def _put_back(file: Path) -> None:
    """The old file and this one change places."""
    if not _old(file).exists():
        raise NotFound(f"there is no {_old(file)} to put back", hint="it is what an upgrade leaves")
    aside = file.with_name(f".{file.name}.aside")
    aside.unlink(missing_ok=True)
    os.link(file, aside)
    _old(file).replace(file)
    aside.replace(_old(file))
    sync_folder(file.parent)


def _old(file: Path) -> Path:
    return file.with_name(f"{file.name}.old")
