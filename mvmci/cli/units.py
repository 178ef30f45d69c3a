"""The verbs that are units of a cluster: worker, executor, and those that `up` starts beside them.

Each runs until it is stopped. SIGTERM or Ctrl-C drains a worker, within --grace. The second one cuts that
short: jobs are handed back as they are. The third does not even wait for that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

from mvmci.cli.complete import complete_at_file, complete_queue
from mvmci.cli.options import (
    HOST_FOLDER,
    cluster_option,
    examples,
    grace_option,
    log_to_stderr,
    option,
    run_async,
    state_option,
)
from mvmci.cluster.identity import TICKET_CHARS_MAX
from mvmci.config.text import decode_text
from mvmci.errors import Usage
from mvmci.system.capacity import processors
from mvmci.trust.known import find_cluster, find_config

_API_PORT = 27288
TOKEN_CHARS_MIN = 16
T = TypeVar("T")

token_option = option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file with the token that executors ask for over HTTP. Make it mode 600.",
)
isolation_options = (
    option(
        "--min-isolation",
        type=click.Choice(["process", "filtered", "confined", "isolated"]),
        default="process",
        show_default=True,
        help="Refuse to run with less.",
    ),
    option(
        "--isolation",
        type=click.Choice(["reuse", "per-job"]),
        default="reuse",
        show_default=True,
        help="A process for many workflows, one after the other, or for each its own.",
    ),
)
join_option = option(
    "--join",
    metavar="TICKET|@FILE|-",
    shell_complete=complete_at_file,
    help="Enrol with a ticket, unless this was done before.",
)
slots_option = option(
    "--slots", type=click.IntRange(1, 1024), help="Jobs at once. As many as it may use processors, if absent."
)
name_option = option("--name", metavar="NAME", help="The unit's name. Of this host, if absent.")
replica_option = option(
    "--replica-of",
    metavar="SERVICE",
    help="One of several containers of that compose service, named by its number.",
)
patient_option = option("--patient", is_flag=True, help="Wait for a cluster that is not there yet.")
config_option = option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="What `mvmci up` or `render` gave this unit.",
    hidden=True,
)


@click.command(
    "worker",
    epilog=examples(
        "mvmci worker --join @ticket            add this machine to a cluster",
        "mvmci worker --join @ticket --slots 8 --label arch=amd64",
        "mvmci worker                           again, under the name that it got",
    ),
)
@join_option
@name_option
@replica_option
@patient_option
@config_option
@slots_option
@option(
    "--queue",
    "queues",
    multiple=True,
    envvar="MVMCI_WORKER_QUEUE",
    shell_complete=complete_queue,
    help="Queues to take jobs from. Those of the ticket, if absent.",
)
@option("--label", "labels", metavar="K=V", multiple=True, help="What is special about this machine.")
@isolation_options[0]
@isolation_options[1]
@token_option
@grace_option
@cluster_option
@state_option
def worker_verb(queues: tuple[str, ...], labels: tuple[str, ...], **options: Any) -> int:
    """Take jobs from a cluster and run them here, until stopped."""
    from mvmci.roles.worker import WorkerOptions, run_worker

    given = dict(_label(text) for text in labels)
    return _run(run_worker, WorkerOptions(queues=queues, labels=given, **_host_options(**options)))


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise Usage(f"--label {text!r} is not of the form K=V")
    return key, value


@click.command(
    "executor",
    epilog=examples(
        "mvmci executor --join @ticket --slots 8     through the broker: no port is opened",
        "mvmci executor --listen 127.0.0.1:27288     over HTTP as well, for this machine",
        "mvmci executor --listen 0.0.0.0:27288 --token-file token",
    ),
)
@join_option
@name_option
@replica_option
@patient_option
@config_option
@slots_option
@option(
    "--listen", metavar="HOST[:PORT]", help=f"Answer HTTP there as well. The port is {_API_PORT}, if absent."
)
@isolation_options[0]
@isolation_options[1]
@token_option
@grace_option
@cluster_option
@state_option
def executor_verb(listen: str | None, **options: Any) -> int:
    """Be an engine for workers that have none of their own, until stopped."""
    from mvmci.roles.executor import ExecutorOptions, run_executor
    from mvmci.roles.unit import given_token

    common = _host_options(**options)
    at = listen_at(listen, common["token"] or given_token(ExecutorOptions(**common))) if listen else None
    return _run(run_executor, ExecutorOptions(listen=at, **common))


def _host_options(
    *,
    state: Path,
    name: str | None,
    replica_of: str | None,
    slots: int | None,
    isolation: str,
    token_file: Path | None,
    grace: int,
    **same: Any,
) -> dict[str, Any]:
    """The fields of `HostOptions`. Raises Usage."""
    if same["join"] == "-":  # before there is a loop, which would not hear Ctrl-C meanwhile
        same["join"] = decode_text(sys.stdin.buffer.read(4 * TICKET_CHARS_MAX))
    if name is None and replica_of is not None:
        from mvmci.runtimes.compose.replica import replica_name
        from mvmci.trust.enrol.client import host_name

        name = replica_name(replica_of, host_name())
    return same | {
        "state": state,
        "root": state / HOST_FOLDER,
        "name": name,
        "slots": slots or processors(),
        "reuse": isolation == "reuse",
        "token": read_token(token_file),
        "grace_ms": grace,
    }


def read_token(file: Path | None) -> str:
    """What is asked for at, or shown to, the HTTP door of executors; empty for none. Raises Usage."""
    if file is None:
        return ""
    try:
        token = decode_text(file.read_bytes()).strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise Usage(f"{file}, which --token-file names, cannot be read: {why}") from None
    if len(token) < TOKEN_CHARS_MIN:
        raise Usage(
            f"the token in {file} has less than {TOKEN_CHARS_MIN} characters",
            hint="`openssl rand -hex 32` makes a good one",
        )
    return token


def listen_at(text: str, token: str, port: int = _API_PORT) -> tuple[str, int]:
    """Where to answer HTTP; at `port` where the text names none. Raises Usage."""
    from mvmci.system.ports import is_loopback

    host, colon, named = text.rpartition(":")
    if not colon or named.endswith("]"):
        host, named = text, str(port)
    host = host.strip("[]")
    if not host or not named.isdecimal() or not 1 <= int(named) <= 65_535:
        raise Usage(f"--listen {text!r} is not of the form HOST:PORT", hint=f"for example 127.0.0.1:{port}")
    if not token and not is_loopback(host):
        raise Usage(
            f"--listen {text} can be reached from other machines, and needs --token-file",
            hint="`(umask 077; openssl rand -hex 32 > token)` makes one; whoever asks shows the same",
        )
    return host, int(named)


@click.command(
    "control-plane",
    epilog=examples("mvmci control-plane --cluster demo      `mvmci up` starts it; several may run"),
)
@name_option
@config_option
@grace_option
@cluster_option
@state_option
def control_plane_verb(
    state: Path, cluster: str | None, name: str | None, config: Path | None, grace: int
) -> int:
    """Keep a cluster's streams, enrol machines, find jobs that were left behind, forget old ones."""
    from mvmci.roles.control_plane import run_control_plane
    from mvmci.roles.unit import UnitOptions

    options = UnitOptions(state=state, cluster=cluster, name=name, config=config, grace_ms=grace)
    return _run(run_control_plane, options)


@click.command("broker", epilog=examples("mvmci broker --cluster demo      `mvmci up` starts it"))
@config_option
@cluster_option
@state_option
def broker_verb(state: Path, cluster: str | None, config: Path | None) -> int:
    """Become the cluster's broker: nats-server, with the configuration that `mvmci up` has laid down."""
    from mvmci.roles.broker import FOLDER, become
    from mvmci.trust.provision import BrokerConfig, read_config

    given = read_config(config or find_config(state, cluster, "broker-1"), BrokerConfig)
    folder = state / given.cluster / FOLDER
    become(folder, given.settings, given.guard(folder))


@click.command(
    "balancer",
    epilog=examples(
        "mvmci balancer --cluster demo --listen 127.0.0.1:8000 --backend a=127.0.0.1:8001    `up` starts it"
    ),
)
@name_option
@config_option
@option(
    "--listen",
    metavar="HOST:PORT",
    required=True,
    envvar="MVMCI_BALANCER_LISTEN",
    help="Where workers dial.",
)
@option("--backend", "backends", metavar="NAME=HOST:PORT", multiple=True, required=True, help="An executor.")
@cluster_option
@state_option
def balancer_verb(
    state: Path,
    cluster: str | None,
    name: str | None,
    config: Path | None,
    listen: str,
    backends: tuple[str, ...],
) -> int:
    """Become a balancer in front of executors: haproxy, which this machine must have."""
    from mvmci.jobs.job import check_id
    from mvmci.roles.balancer import exec_balancer
    from mvmci.trust.provision import BalancerConfig, read_config

    name = check_id(name or "balancer", "unit's name")
    folder = state / find_cluster(state, cluster) / "units" / name
    config = config or folder / "config.json"
    given = read_config(config, BalancerConfig) if config.exists() else None
    exec_balancer(folder, listen, backends, given)


def _run(run: Callable[[T], Coroutine[Any, Any, int]], options: T) -> int:
    """Run a unit, which logs to standard error. Raises Usage."""
    from mvmci.roles.unit import new_event_loop

    log_to_stderr()
    return run_async(run(options), cancels=2, loop=new_event_loop)
