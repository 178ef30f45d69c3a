"""Requests for jobs as they are typed: their options, and the files that they name.

`run` and `submit` share all of it. A file that several requests name is read once and stored once.
"""

from __future__ import annotations

import functools
import getpass
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mvmci.cli.complete import complete_at_file, complete_file, complete_queue
from mvmci.cli.options import Decorator, Duration, Size, option
from mvmci.config.text import plain_text
from mvmci.errors import Usage
from mvmci.jobs.journal import Spec
from mvmci.jobs.module import MODULE_BYTES_MAX, Module, inspect_module
from mvmci.journals.request import (
    INPUT_BYTES_MAX,
    CheckedRequest,
    Digests,
    JobRequest,
    check_request,
    spec_of,
)
from mvmci.store import Store
from mvmci.system.clock import wall_clock_ms

STDIN_BYTES_MAX = 256 << 20
FILES_BYTES_MAX = 1 << 30  # modules and standard inputs of all jobs together: they are held in memory
STDIN = "-"


_OPTIONS: tuple[Decorator, ...] = (
    option("--id", metavar="ID", help="The job's id and idempotency key. By default, a random one."),
    option(
        "--queue",
        default="default",
        show_default=True,
        shell_complete=complete_queue,
        help="The queue it belongs to.",
    ),
    option("--input", metavar="JSON|@FILE", shell_complete=complete_at_file, help="A workflow's input."),
    option(
        "--dir", type=click.Path(path_type=Path), help="A directory that is copied and becomes the workspace."
    ),
    option("--artifact", metavar="GLOB", multiple=True, help="Files to keep at the end."),
    option("--env", metavar="K=V", multiple=True, help="The guest's environment. Not for secrets."),
    option(
        "--stdin",
        metavar="FILE|-",
        shell_complete=complete_file,
        help="The guest's standard input. By default, empty.",
    ),
    option(
        "--timeout", type=Duration(), default="1h", show_default=True, help="From its first start to its end."
    ),
    option("--memory", type=Size(), default="1GiB", show_default=True, help="Memory of the guest."),
    option(
        "--output-limit",
        type=Size(),
        default="64MiB",
        show_default=True,
        help="Bytes of stdout and stderr together.",
    ),
    option("--disk", type=Size(), default="4GiB", show_default=True, help="Size of the workspace."),
    option(
        "--attempts",
        type=click.IntRange(1, 1000),
        default=5,
        show_default=True,
        help="How many workers may be lost.",
    ),
)


def job_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Give `verb` the options that make a request; it gets them under the names of `JobRequest`'s fields."""
    for decorate in reversed(_OPTIONS):
        verb = decorate(verb)
    return verb


class RequestFiles:
    """What requests name: read when they are checked, and then put into a store."""

    def __init__(self, state: Path | None = None) -> None:
        """The state directory `state` is left out of directories that hold it: it has keys."""
        self._state = state
        self._modules: dict[str, Module] = {}
        self._data: dict[str, bytes] = {}  # by the name of the file
        self._directories: set[Path] = set()
        self._digests: dict[str | Path, str] = {}
        self._bytes = 0

    def check(self, request: JobRequest) -> CheckedRequest:
        """Read all that `request` names but its directory. Raises Usage, BadModule."""
        if request.module == request.stdin == STDIN:
            raise Usage("standard input cannot be the module and the guest's as well", hint="name a file")
        module = self._module(request.module)
        checked = check_request(
            request,
            module,
            name=os.path.basename(request.module),
            read=lambda typed: read_text(typed[1:], INPUT_BYTES_MAX).decode() if typed[:1] == "@" else typed,
        )
        if request.stdin is not None:
            self._read(request.stdin, STDIN_BYTES_MAX)
        if request.dir is not None:
            self._directories.add(request.dir)
        return checked

    def _module(self, name: str) -> Module:
        if name not in self._modules:
            data = self._read(name, MODULE_BYTES_MAX)
            self._modules[name] = inspect_module(data, name=name)
        return self._modules[name]

    def _read(self, name: str, bytes_max: int) -> bytes:
        if name not in self._data:
            data = read_input(name, bytes_max)
            self._bytes += len(data)
            if self._bytes > FILES_BYTES_MAX:
                raise Usage(
                    f"with {name}, the modules and standard inputs are over {FILES_BYTES_MAX >> 30} GiB",
                    hint="submit them in several batches",
                )
            self._data[name] = data
        return self._data[name]

    async def keep(self, store: Store) -> None:
        """Put all of it into `store`. Raises BadWorkspace, StoreUnavailable."""
        blobs = store.blobs
        if sys.stderr.isatty():
            from mvmci.cli.uploads import Uploads

            blobs = Uploads(blobs)
        for name in list(self._data):
            self._digests[name] = await blobs.put(self._data.pop(name))
        for directory in self._directories:
            from mvmci.engines.embedded import workspace
            from mvmci.jobs import tree

            without = self._state_within(directory)
            if without is not None:
                click.echo(f"left out of {directory}: {without} (the state directory)", err=True)
            snapshot = await workspace.scan(directory, blobs, without=without)
            self._digests[directory] = await blobs.put(tree.encode_tree(snapshot.tree))

    def _state_within(self, directory: Path) -> str | None:
        """The relative path of the state directory in `directory`. Raises Usage where it is that."""
        if self._state is None or not self._state.is_dir():
            return None
        state, top = self._state.resolve(), directory.resolve()
        if state == top:
            raise Usage(f"{directory} is the state directory, which has keys", hint="name another one")
        return str(state.relative_to(top)) if state.is_relative_to(top) else None

    async def spec(self, checked: CheckedRequest, job: str, store: Store) -> Spec:
        """What the job is; `keep` comes first."""
        request = checked.request
        digests = Digests(
            module=self._digests[request.module],
            stdin=self._digests[request.stdin] if request.stdin is not None else None,
            tree=self._digests[request.dir] if request.dir is not None else None,
        )
        return await spec_of(checked, job, digests, store, at=wall_clock_ms(), by=who())


def read_input(name: str, bytes_max: int) -> bytes:
    """The bytes of a file, or of standard input for `-`. Raises Usage."""
    try:
        if name == STDIN:
            data = sys.stdin.buffer.read(bytes_max + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(bytes_max + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise Usage(f"{name} cannot be read: {why}") from None
    if len(data) > bytes_max:
        raise Usage(f"{name} is larger than {bytes_max >> 20} MiB, which is the most that is taken")
    return data


def read_text(name: str, bytes_max: int) -> bytes:
    """The same for what a person wrote: as UTF-8, without a byte-order mark. Raises Usage."""
    try:
        return plain_text(read_input(name, bytes_max))
    except UnicodeDecodeError:
        raise Usage(f"{name} is not text", hint="save it as UTF-8") from None


@functools.cache
def who() -> str:
    """Who asks, for the journal."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have them
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
