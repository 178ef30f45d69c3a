"""What runs on each host that has units, and is not for people: the supervisor, and who does as `up` asks."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import msgspec

from mvmci.cli.options import log_to_stderr, make_state, state_option
from mvmci.errors import Usage

if TYPE_CHECKING:
    from mvmci.runtimes.local.messages import Desired, Handover

UNITS_GRACE = "1d"  # the supervisor counts, and cuts them short when it is time


@click.command("supervise", hidden=True)
@click.option("--cluster", required=True)
@click.option("--attached", type=int, help="End when the process of this number does.")
@click.option("--resume", is_flag=True, help="Go on with what was asked for before, and read nothing.")
@click.option("--take-over", is_flag=True, help="Go on with what this process ran as another program.")
@click.option("--check", is_flag=True, help="Do nothing: whoever hears no error can start it so.")
@state_option
def supervise_verb(
    cluster: str, attached: int | None, resume: bool, take_over: bool, check: bool, state: Path
) -> int:
    """Keep the units of a cluster running: what `up` starts here, and leaves behind. It reads what it begins
    with, as JSON."""
    from mvmci.runtimes.local.service import FOR_SUPERVISOR
    from mvmci.runtimes.local.supervisor import supervise
    from mvmci.system.linux import die_with
    from mvmci.system.processes import clean_environment, this_program

    if check:
        return 0
    if attached is not None:
        die_with(attached, signal.SIGTERM)
    program = this_program()
    begin = None if resume else _begin(program, take_over=take_over)
    log_to_stderr()
    env = {key: value for key, value in clean_environment(state).items() if key not in FOR_SUPERVISOR}
    env["MVMCI_GRACE"] = UNITS_GRACE
    options = () if attached is None else ("--attached", str(attached))
    running = supervise(
        state / cluster, begin, program, env, ready=_say_ready, options=options, kept=attached is None
    )
    try:
        asyncio.run(running)
    except FileNotFoundError:
        if (state / cluster).exists():
            raise
        # All of the cluster was removed while this one started, as a boot has it.
    return 0


def _begin(program: list[str], *, take_over: bool) -> Desired | Handover:
    """What a supervisor, which is `program`, is told to begin with. Raises Usage."""
    from mvmci.runtimes.local.messages import Handover, Start, desired_by

    told = sys.stdin.buffer.read()
    if take_over:
        return msgspec.json.decode(told, type=Handover)
    try:
        return desired_by(msgspec.json.decode(told, type=Start), program)
    except msgspec.DecodeError:
        raise Usage(
            "what is to run was not told to its end: who started this has died",
            hint="`mvmci up` does it anew",
        ) from None


def _say_ready() -> None:
    """Tell who started us, and let go of that pipe."""
    os.write(sys.stdout.fileno(), b"ready\n")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@click.command("host", hidden=True)
@click.option("--cluster", required=True)
@click.option("--service", type=click.Choice(["auto", "system", "user", "none"]), default="auto")
@click.option("--forget", is_flag=True, help="Stop and remove what is here, after it was given up.")
@state_option
def host_verb(
    cluster: str, service: Literal["auto", "system", "user", "none"], forget: bool, state: Path
) -> int:
    """Do what an `up` on another machine asks for, while its channel of ssh is open. JSON in, JSON out."""
    from mvmci.jobs.job import check_id
    from mvmci.runtimes.local.agent import remove, serve_stdio
    from mvmci.runtimes.local.runtime import Local
    from mvmci.runtimes.local.service import choose

    name = check_id(cluster, "cluster name")
    if forget:
        asyncio.run(remove(Local(state, name)))
        click.echo(f"{state / name} was removed")
        return 0
    make_state(state)
    asyncio.run(serve_stdio(Local(state, name, service=choose(service))))
    return 0
