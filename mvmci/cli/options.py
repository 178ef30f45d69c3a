"""What several verbs share: options with their variables, the state directory, and the place of jobs.

A place is a cluster that this machine is a client of, or the store of `run` on this machine.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mvmci.config.quantity import parse_duration, parse_size
from mvmci.errors import MvmciError, StoreUnavailable, TicketRefused, Usage

if TYPE_CHECKING:  # `version` and `--help` need no event loop and no records
    from asyncio import AbstractEventLoop

    from mvmci.cluster.identity import Identity
    from mvmci.store import Store
    from mvmci.stores.nats.link import Link

T = TypeVar("T")
R = TypeVar("R")
LOCAL_UNIT = "run"
LOCAL_FOLDER = "_local"  # the store of `run`
HOST_FOLDER = "_host"  # slots and compiled code of this machine
CLIENT = "client.json"  # in a cluster's folder: an Identity of role client
RENEW_S = 2.0  # for so long a verb waits for a newer credential, while the old one is still good
RENEW_LOOK_S = 60.0
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def examples(*lines: str) -> str:
    """The end of a verb's help."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


def option(*names: str, **settings: Any) -> Decorator:
    """A click option that can also be set by `MVMCI_<NAME>`."""
    long = max((name for name in names if name.startswith("--")), key=len).split("/")[0]
    settings.setdefault("envvar", "MVMCI_" + long.strip("-").replace("-", "_").upper())
    return click.option(*names, show_envvar=True, **settings)


class Duration(click.ParamType[int]):
    """Milliseconds, from `90`, `500ms`, `1h`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_duration(value, minimum_ms=1)
        except Usage as error:
            self.fail(f"{error.message} ({error.hint})" if error.hint else error.message, param, ctx)


class Size(click.ParamType[int]):
    """Bytes, from `4096`, `64MiB`, `1GiB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value, minimum_bytes=1)
        except Usage as error:
            self.fail(f"{error.message} ({error.hint})" if error.hint else error.message, param, ctx)


def default_state() -> Path:
    """The XDG state directory's part that is ours."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    if base.startswith("~"):
        raise Usage(
            "this user has no home directory", hint="name a state directory with --state or MVMCI_STATE"
        )
    return Path(base) / "mvmci"


state_option = option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_state,
    show_default="XDG state directory",
    help="The directory of all that mvmci keeps.",
)
json_option = option("--json", "as_json", is_flag=True, help="Print JSON with stable keys.")
cluster_option = option("--cluster", metavar="NAME", help="The cluster. By default, the only one known here.")
local_option = option("--local", is_flag=True, help="Jobs of `mvmci run` on this machine.")


def complete_id(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The ids of local jobs, for tab completion."""
    jobs = (ctx.params.get("state") or default_state()) / LOCAL_FOLDER / "jobs"
    return sorted(path.name for path in jobs.glob(f"{incomplete}*")) if jobs.is_dir() else []


def complete_access(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The accesses that are installed, for tab completion."""
    from mvmci.deploy.access import accesses

    return [name for name in accesses() if name.startswith(incomplete)]


id_argument = click.argument("job", metavar="ID", shell_complete=complete_id)


def find_cluster(state: Path, name: str | None) -> str:
    """The cluster that is meant: `name`, or the only one that this machine knows.

    Raises StoreUnavailable where there is none, Usage where there are several.
    """
    from mvmci.jobs.job import check_id

    if name is not None:
        check_id(name, "cluster name")
    known = sorted(
        path.name
        for path in (state.iterdir() if state.is_dir() else ())
        if not path.name.startswith("_") and any((path / part).exists() for part in KNOWN_BY)
    )
    if name in known or (name is None and len(known) == 1):
        return name or known[0]
    if known and name is None:
        raise Usage(f"several clusters are known here: {', '.join(known)}", hint="name one with --cluster")
    others = f"; known are {', '.join(known)}" if known else ""
    raise StoreUnavailable(
        f"the cluster {name} is not known here{others}" if name else "no cluster is known here",
        hint="`mvmci up` starts one, `mvmci login @ticket` makes this machine a client of one; "
        "--local is for jobs of `mvmci run` on this machine",
    )


KNOWN_BY = (CLIENT, "keys", "units")


@dataclass(frozen=True)
class Location:
    """Where a verb looks for jobs: a cluster, or with `local` the store of `run`."""

    state: Path
    local: bool = False
    cluster: str | None = None

    def verb(self, words: str) -> str:
        """How a verb on this place is typed, for hints."""
        where = " --local" if self.local else f" --cluster {self.cluster}" if self.cluster else ""
        return f"`mvmci {words}{where}`"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Store]:
        """Its store. A verb that only reads makes no directory: where there is none, there are no jobs.

        Raises StoreUnavailable, TicketRefused, Usage.
        """
        if self.local:
            folder = self.state / LOCAL_FOLDER
            store = open_local(folder if folder.exists() else None)
            try:
                yield store
            finally:
                await store.close()
            return
        async with _joined(self.state / find_cluster(self.state, self.cluster)) as store:
            yield store


def place_options(verb: Callable[..., int]) -> Callable[..., int]:
    """Give `verb` the options that say where it looks, as its argument `place`."""

    @functools.wraps(verb)
    def with_place(state: Path, local: bool, cluster: str | None, **options: Any) -> int:
        return verb(place=Location(state, local, cluster), **options)

    return state_option(cluster_option(local_option(with_place)))


def open_local(folder: Path | None) -> Store:
    """The store of `run`, in `folder`, or an empty one in memory. Raises Usage."""
    from mvmci.stores import open_memory

    return open_memory(LOCAL_UNIT, folder)


def make_state(state: Path) -> None:
    """Make the state directory where it is missing. Raises Usage."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Usage(
            f"the state directory {state} cannot be made: {error.strerror}",
            hint="name another one with --state DIR or MVMCI_STATE",
        ) from None


@asynccontextmanager
async def _joined(folder: Path) -> AsyncIterator[Store]:
    """The store of a cluster, for a client: it is no member, and only looks who is."""
    import asyncio

    from mvmci.stores import open_cluster

    identity = client_of(folder)
    cluster = await open_cluster(identity, announce=False)
    keeping = None
    try:
        if identity.login.jwt:
            await _renew(cluster.link, folder / CLIENT)
            keeping = asyncio.create_task(_renew_always(cluster.link, folder / CLIENT), name="renew")
        yield cluster.store
    finally:
        if keeping is not None:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        await cluster.close()


async def _renew_always(link: Link, path: Path) -> None:
    """A verb may wait for longer than a token lives."""
    import asyncio

    while True:
        await asyncio.sleep(RENEW_LOOK_S)
        await _renew(link, path)


async def _renew(link: Link, path: Path) -> None:
    """Get a newer token if that is due; the broker asks for it when the old one's time is up.

    Who cannot get one now goes on with what there is.
    """
    import asyncio
    import time

    from mvmci.trust.authority import read_identity
    from mvmci.trust.enrol.client import is_due, renew

    identity = read_identity(path)
    if identity is None or not is_due(identity, time.time()):
        return
    with suppress(MvmciError, TimeoutError):
        async with asyncio.timeout(RENEW_S):
            link.login = (await renew(link, identity, path)).login


def client_of(folder: Path) -> Identity:
    """Who this machine is to the cluster: what its keys make of it, else what `login` left.

    Raises TicketRefused, StoreUnavailable, Usage.
    """
    from mvmci.cluster.identity import Identity

    if (folder / "keys").is_dir():
        made = _made_here(folder)
        if made is not None:
            return made
    found = _read(folder / CLIENT, Identity)
    if found is None:
        raise TicketRefused(
            f"this machine is no client of {folder.name}", hint="`mvmci login @ticket` makes it one"
        )
    return found


def _made_here(folder: Path) -> Identity | None:
    """The client that the keys of this machine make; None before `up` has laid down its broker."""
    import secrets

    import msgspec

    from mvmci.cluster.identity import Login
    from mvmci.trust.authority import Authority, read_identity

    facts = _read(folder / "cluster.json", dict)
    if facts is None:
        return None
    there = read_identity(folder / CLIENT)
    unit = there.unit if there is not None else f"client-{secrets.token_hex(4)}"
    base = msgspec.convert(facts["login"], Login)
    return Authority.load(folder).identity(unit, "client", (), base, folder / CLIENT)


def _read(path: Path, kind: type[T]) -> T | None:
    """What a file of JSON says; None if there is none. Raises Usage."""
    import msgspec

    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise Usage(f"{path} cannot be read: {why}", hint="remove it, and `up` or log in again") from None


EXIT_PIPE = 141


class ReaderGone(Exception):
    """Nobody reads our output any more, and so nobody is left to tell."""

    exit_code = EXIT_PIPE


class Interrupted(Exception):
    """A signal asked us to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.exit_code = 128 + signum


def run_async(
    main: Coroutine[Any, Any, T],
    *,
    cancels: int = 1,
    loop: Callable[[], AbstractEventLoop] | None = None,
) -> T:
    """Run `main`; SIGINT, SIGTERM and SIGHUP cancel it, so many times, and the next ends the process at once.

    It runs on what `loop` makes, if given. Raises Interrupted or ReaderGone once everything is cleaned up.
    """

    import asyncio

    async def watched() -> T:
        task = asyncio.ensure_future(main)
        caught: list[int] = []

        def stop(signum: int) -> None:
            if len(caught) == cancels:
                os._exit(128 + signum)
            caught.append(signum)
            task.cancel()

        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(signum, stop, signum)
        try:
            return await task
        except asyncio.CancelledError:
            if caught:
                raise Interrupted(caught[0]) from None
            raise
        except BrokenPipeError:  # not let out, because click would end the process with 1
            raise ReaderGone from None

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(watched())


async def spread(work: Callable[[T], Awaitable[R]], items: Collection[T], *, at_once: int) -> list[R]:
    """`work` on each of `items`, some at a time; the results in the order of the items.

    The first failure ends all of them, and is raised.
    """
    import asyncio

    todo = enumerate(items)
    results: dict[int, R] = {}

    async def take() -> None:
        for index, item in todo:
            results[index] = await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(items))):
                group.create_task(take())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [results[index] for index in range(len(items))]
