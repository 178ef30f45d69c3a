"""What several verbs share: options with their variables, the state directory, the local store."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mvmci.errors import StoreUnavailable, Usage
from mvmci.quantity import parse_duration, parse_size

if TYPE_CHECKING:  # `version` and `--help` need no event loop and no records
    from mvmci.store import Store

T = TypeVar("T")
LOCAL_UNIT = "run"
LOCAL = "_local"  # the store of `run`
HOST = "_host"  # slots and compiled code of this machine
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
    help="Where mvmci keeps everything.",
)
json_option = option("--json", "as_json", is_flag=True, help="Print JSON with stable keys.")
local_option = option("--local", is_flag=True, help="Read what `mvmci run` left on this machine.")


def complete_id(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The ids of local jobs, for tab completion."""
    jobs = (ctx.params.get("state") or default_state()) / LOCAL / "jobs"
    return sorted(path.name for path in jobs.glob(f"{incomplete}*")) if jobs.is_dir() else []


id_argument = click.argument("job", metavar="ID", shell_complete=complete_id)


@asynccontextmanager
async def open_store(state: Path, *, local: bool = True, create: bool = False) -> AsyncIterator[Store]:
    """The store that a verb works on. Without `local` it is a cluster's, and there is none yet.

    A verb that only reads makes no directory: where there is none, there are no jobs.
    """
    if not local:
        raise StoreUnavailable(
            "no cluster is known here", hint="--local reads what `mvmci run` left on this machine"
        )
    from mvmci.stores.memory import Memory

    try:
        if create:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Usage(
            f"the state directory {state} cannot be made: {error.strerror}",
            hint="name another one with --state DIR or MVMCI_STATE",
        ) from None
    folder = state / LOCAL
    store = Memory(folder if create or folder.exists() else None).store(LOCAL_UNIT)
    try:
        yield store
    finally:
        await store.close()


EXIT_PIPE = 141


class ReaderGone(Exception):
    """Nobody reads our output any more, and so nobody is left to tell."""

    exit_code = EXIT_PIPE


class Interrupted(Exception):
    """A signal asked us to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.exit_code = 128 + signum


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run `main`; SIGINT, SIGTERM and SIGHUP cancel it, and a second one ends the process at once.

    Raises Interrupted or ReaderGone once everything is cleaned up.
    """

    import asyncio

    async def watched() -> T:
        task = asyncio.ensure_future(main)
        caught: list[int] = []

        def stop(signum: int) -> None:
            if caught:
                os._exit(128 + signum)
            caught.append(signum)
            task.cancel()

        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(signum, stop, signum)
        try:
            return await task
        except asyncio.CancelledError:
            if caught:
                raise Interrupted(caught[0]) from None
            raise
        except BrokenPipeError:  # not let out, because click would end the process with 1
            raise ReaderGone from None

    return asyncio.run(watched())
