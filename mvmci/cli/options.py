"""What several verbs share: options with their variables, the state directory, and the place of jobs.

A place is a cluster that this machine is a client of, or the store of `run` on this machine.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mvmci.cli.complete import complete_cluster, complete_id
from mvmci.config.quantity import parse_duration, parse_size
from mvmci.errors import StoreFull, StoreUnavailable, Usage
from mvmci.system.files import private_folder
from mvmci.system.processes import heeded
from mvmci.system.text import one_line, printable
from mvmci.trust.known import LOCAL_FOLDER, find_cluster

if TYPE_CHECKING:  # `version` and `--help` need no event loop and no records
    from asyncio import AbstractEventLoop

    from mvmci.store import Store

TROUBLE_EVERY_S, TROUBLE_LOOKS = 0.5, 4  # a write that is not answered while the broker is in trouble
T = TypeVar("T")
R = TypeVar("R")
LOG_LEVELS = ("debug", "info", "warning", "error")
WIDTH = 1 << 20  # of tables, off a terminal: a row is one line, however long
REASON_WIDTH_MIN = 20  # of a table's last column
LOCAL_UNIT = "run"
HOST_FOLDER = "_host"  # slots and compiled code of this machine
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class LogLines(logging.Formatter):
    """A time as everywhere, RFC 3339 UTC with milliseconds, a level and a sentence."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        from mvmci.jobs.summary import rfc3339

        return str(rfc3339(int(record.created * 1000)))

    def format(self, record: logging.LogRecord) -> str:
        """A message is one line, whatever it tells of; a traceback keeps its own."""
        record.msg, record.args = one_line(record.getMessage()), ()
        return printable(super().format(record))


def log_to_stderr() -> None:
    """Let this process log to standard error. Raises Usage for a level that there is not."""
    level = os.environ.get("MVMCI_LOG") or "info"
    if level.lower() not in LOG_LEVELS:
        raise Usage(
            f"MVMCI_LOG is {level[:80]!r}, which is no level of the log",
            hint="debug, info, warning and error are; info is the default",
        )
    handler = logging.StreamHandler()
    handler.setFormatter(LogLines())
    logging.basicConfig(level=level.upper(), handlers=[handler])


def examples(*lines: str) -> str:
    """The end of a verb's help."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


def option(*names: str, **settings: Any) -> Decorator:
    """A click option that can also be set by `MVMCI_<NAME>`.

    One of that name which means something else for another verb has its verb in its `envvar`.
    """
    long = max((name for name in names if name.startswith("--")), key=len).split("/")[0]
    settings.setdefault("envvar", "MVMCI_" + long.strip("-").replace("-", "_").upper())
    return click.option(*names, show_envvar=True, **settings)


class _Quantity(click.ParamType[int]):
    parse: Callable[[Any], int]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return self.parse(value)
        except Usage as error:
            self.fail(f"{error.message} ({error.hint})" if error.hint else error.message, param, ctx)


class Duration(_Quantity):
    """Milliseconds, from `90`, `500ms`, `1h`."""

    name = "duration"
    parse = staticmethod(functools.partial(parse_duration, minimum_ms=1))


class Size(_Quantity):
    """Bytes, from `4096`, `64MiB`, `1GiB`."""

    name = "size"
    parse = staticmethod(functools.partial(parse_size, minimum_bytes=1))


class Share(click.ParamType[float]):
    """A part of a whole, from `20%`."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip().removesuffix("%")
        if not text.isdecimal() or not 1 <= int(text) <= 100:
            self.fail(f"{value!r} is not of the form 20%, from 1% to 100%", param, ctx)
        return int(text) / 100


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
cluster_option = option(
    "--cluster",
    metavar="NAME",
    shell_complete=complete_cluster,
    help="The cluster. By default, the only one known here.",
)
grace_option = option(
    "--grace",
    type=Duration(),
    default="30s",
    show_default=True,
    help="How long jobs may take to finish once it stops.",
)
local_option = option("--local", is_flag=True, help="Jobs of `mvmci run` on this machine.")


id_argument = click.argument("job", metavar="ID", shell_complete=complete_id)


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
            store = open_local(folder, make=False)
            try:
                yield store
            finally:
                await store.close()
            return
        import asyncio

        from mvmci.trust.client import open_client

        name = find_cluster(self.state, self.cluster)
        try:
            async with open_client(self.state / name) as cluster:
                _, loss = await asyncio.gather(cluster.config.settings(), cluster.config.loss())
                say_loss(loss.what if loss is not None else ())
                yield cluster.store
        except StoreUnavailable as away:
            from mvmci.deploy.operate import check_up
            from mvmci.deploy.state import ClusterState

            await check_up(ClusterState(self.state, name), away)
            raise

    async def written(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` comes to, which writes to the place.

        Raises StoreFull when a broker on this machine has no room, which may leave it without an answer.
        """
        import asyncio

        from mvmci.roles.broker import FOLDER, trouble

        folder = None if self.local else self.state / find_cluster(self.state, self.cluster) / FOLDER
        task, stuck = asyncio.ensure_future(work), 0
        try:
            while not (await asyncio.wait([task], timeout=TROUBLE_EVERY_S))[0] and stuck < TROUBLE_LOOKS:
                stuck += bool(folder is not None and trouble(folder))
            if task.done() or folder is None:
                return await task
            raise StoreFull(trouble(folder), hint="make room: then it goes on by itself, and try this again")
        finally:
            task.cancel()


def place_options(verb: Callable[..., int]) -> Callable[..., int]:
    """Give `verb` the options that say where it looks, as its argument `place`."""

    @functools.wraps(verb)
    def with_place(state: Path, local: bool, cluster: str | None, **options: Any) -> int:
        return verb(place=Location(state, local, cluster), **options)

    return state_option(cluster_option(local_option(with_place)))


def open_local(folder: Path, *, make: bool = True) -> Store:
    """The store of `run`, in `folder`. Raises Usage."""
    from mvmci.stores import open_folder

    return open_folder(LOCAL_UNIT, folder, make=make)


def make_state(state: Path) -> None:
    """Make the state directory where it is missing. Raises Usage."""
    try:
        private_folder(state)
    except OSError as error:
        raise Usage(
            f"the state directory {state} cannot be made: {error.strerror}",
            hint="name another one with --state DIR or MVMCI_STATE",
        ) from None


def say_loss(what: Iterable[str]) -> None:
    """Say what the store of a cluster lacks, on standard error."""
    for one in what:
        click.echo(f"warning: records were lost: {one}; `mvmci recover` says what is missing", err=True)


def make_table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> Any:
    """A table of `rich`. Where it is too wide only its last column is folded.

    What is copied from the others, as an id, stays in one piece.
    """
    from rich.cells import cell_len
    from rich.table import Table

    shown = [[one_line(cell) for cell in row] for row in rows]
    table, *columns = Table(box=None, pad_edge=False), *zip(titles, *shown, strict=True)
    for cells in columns:
        whole = max(map(cell_len, cells))
        least = min(whole, REASON_WIDTH_MIN) if cells is columns[-1] else whole
        table.add_column(cells[0], overflow="fold", min_width=least)
    for row in zip(*(cells[1:] for cells in columns), strict=True):
        table.add_row(*row)
    return table


def print_table(table: Any) -> None:
    """As wide as the terminal, or as it has to be; off one, a line a row."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH
    Console(width=width, highlight=False, markup=False).print(table, crop=False)


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

    One that was ignored when we were started stays so: `nohup`, and what a shell runs in the background.

    It runs on what `loop` makes, if given. Raises Interrupted once everything is cleaned up.
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

        for signum in heeded(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(signum, stop, signum)
        try:
            return await task
        except asyncio.CancelledError:
            if caught:
                raise Interrupted(caught[0]) from None
            raise

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
