"""The verb that measures cluster files side by side, and says which to use: bench."""

from __future__ import annotations

import difflib
import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mvmci.cli.complete import complete_at_file, complete_file, complete_profile
from mvmci.cli.options import (
    Duration,
    Interrupted,
    cluster_option,
    examples,
    json_option,
    make_state,
    option,
    run_async,
    state_option,
)
from mvmci.cli.request import RequestFiles
from mvmci.errors import EXIT_FAILED, Usage
from mvmci.journals.request import JobRequest
from mvmci.system.text import one_line
from mvmci.trust.known import find_cluster

if TYPE_CHECKING:
    from mvmci.bench.profiles import Profile
    from mvmci.bench.report import Report
    from mvmci.store import Store

BUDGET = "15m"
DEFAULT = ("waiting", "light")


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers over 0, from `1,2,4`; each once, in order."""

    name = "numbers"

    def __init__(self, most: int) -> None:
        self._most = most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        texts = str(value).split(",")
        if not all(text.strip().isdecimal() and 1 <= int(text) <= self._most for text in texts):
            self.fail(f"{value!r} is not of the form 1,2,4, from 1 to {self._most}", param, ctx)
        return tuple(sorted({int(text) for text in texts}))


class Rate(click.FloatRange):
    """Jobs/s: what one process can plan and submit. Not a number is none."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True, max=100_000)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        rate: float = super().convert(value, param, ctx)
        if math.isnan(rate):
            self.fail(f"{value!r} is not a rate", param, ctx)
        return rate


@click.command(
    "bench",
    epilog=examples(
        "mvmci init --access peer peer                 a FILE, one for each access to compare",
        "mvmci bench */topology.yaml                   which should I use on these machines?",
        "mvmci bench mine.yaml --module build.wasm     the same, for jobs of your own",
        "mvmci bench pool.yaml --profile effects --workers 1,2,4,8 --budget 5m",
        "mvmci bench */topology.yaml --loads 100,500,1000",
        "mvmci bench */topology.yaml --page bench.html --save bench.json",
        "mvmci bench                                   what the cluster that is up does under load",
    ),
)
@click.argument("files", metavar="[FILE]...", nargs=-1, type=click.Path(path_type=Path))
@option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="NAME",
    envvar="MVMCI_BENCH_PROFILE",
    shell_complete=complete_profile,
    help="What jobs do: waiting, light, command, cpu, effects, memory, mixed or tree; several times for "
    "several. By default, waiting and light.",
)
@option(
    "--module",
    metavar="M",
    shell_complete=complete_file,
    envvar="MVMCI_BENCH_MODULE",
    help="Jobs of this module, instead.",
)
@option(
    "--input",
    "input_",
    metavar="JSON|@FILE",
    shell_complete=complete_at_file,
    envvar="MVMCI_BENCH_INPUT",
    help="Their input, if they are workflows.",
)
@option(
    "--dir",
    type=click.Path(path_type=Path),
    envvar="MVMCI_BENCH_DIR",
    help="A directory that is copied and becomes their workspace.",
)
@option("--env", metavar="K=V", multiple=True, envvar="MVMCI_BENCH_ENV", help="Their environment.")
@option(
    "--arg", "args", metavar="ARG", multiple=True, help="An argument of theirs; several times for several."
)
@option(
    "--workers",
    type=Numbers(1000),
    metavar="N,…",
    envvar="MVMCI_BENCH_WORKERS",
    help="How many there are to be. By default 1,2,4,8,16,32, as far as memory goes.",
)
@option(
    "--slots",
    type=click.IntRange(1, 1024),
    envvar="MVMCI_BENCH_SLOTS",
    help="Of each worker. By default, those of the files where they agree, else 2.",
)
@option(
    "--as-is",
    is_flag=True,
    help="Leave all slots as the files say: they may then be the bottleneck.",
)
@option(
    "--loads",
    type=Numbers(100_000),
    default=(),
    metavar="N,…",
    help="So many jobs submitted at once, as well; what became of them is counted by the journals.",
)
@option("--rate", type=Rate(), help="Jobs/s at which latency is measured.")
@option("--budget", type=Duration(), default=BUDGET, show_default=True, help="How long all of it may take.")
@option("--page", type=click.Path(dir_okay=False, path_type=Path), help="Write a page for a browser there.")
@option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there, as JSON.")
@json_option
@cluster_option
@state_option
def bench_verb(files: tuple[Path, ...], state: Path, **options: Any) -> int:
    """Measure cluster FILEs side by side, and say which to use, and what bounds it.

    Each is brought up as a cluster of its own, with as many workers as are measured, and down again; what is
    up already is left alone, but shares the machine. Without a FILE the cluster that is up is put under load.
    """
    from mvmci.bench.session import Options, bench, bench_cluster

    make_state(state)
    page, save, as_json = options.pop("page"), options.pop("save"), options.pop("as_json")
    for file in files:
        if file.suffix == ".wasm":
            raise Usage(f"{file} is a module, and no cluster file", hint=f"name it by --module {file}")
    _check_writable([one for one in (page, save) if one is not None], files)
    request = JobRequest(
        module=options.pop("module") or "",
        args=options.pop("args"),
        input=options.pop("input_"),
        dir=options.pop("dir"),
        env=options.pop("env"),
    )
    profiles = _profiles(options.pop("profiles"), request, state)
    cluster = options.pop("cluster")
    budget_s = options.pop("budget") / 1000
    told = Progress()
    reports: list[Report] = []
    wanted = Options(files=files, profiles=profiles, budget_s=budget_s, **options)
    if files:
        measuring = bench(state, wanted, told.tell, reports.append)
    else:
        if wanted.workers or wanted.slots or wanted.as_is:
            raise Usage(
                "a cluster that is up is measured as it is",
                hint="--workers, --slots and --as-is are for FILEs",
            )
        name = find_cluster(state, cluster)
        measuring = bench_cluster(state, name, wanted, told.tell, reports.append)
    try:
        try:
            run_async(measuring)
        finally:  # what was measured is shown, whatever ended it
            told.end()
            for report in reports:
                _show(report, as_json=as_json, page=page, save=save)
    except Interrupted:
        had = ", and what was measured until then is told" if reports else ""
        click.echo(f"interrupted: {'all clusters are down again' if files else 'jobs go on'}{had}", err=True)
        raise
    counted = reports[0].counted
    return EXIT_FAILED if counted.lost or counted.twice else 0


def _check_writable(written: list[Path], read: tuple[Path, ...]) -> None:
    """Raises Usage, before the time is spent, where a report could not be written there, or would be instead
    of something else."""
    places = [one.resolve() for one in (*read, *written)]
    for place, file in enumerate(written, len(read)):
        there = file if file.exists() else file.absolute().parent
        if places[place] in places[:place]:
            raise Usage(f"{file} cannot be written: it is named twice")
        if not file.absolute().parent.is_dir():
            raise Usage(f"{file} cannot be written: there is no folder {there}")
        if not os.access(there, os.W_OK):
            raise Usage(f"{file} cannot be written: that is not yours to write")


def _profiles(names: tuple[str, ...], request: JobRequest, state: Path) -> dict[str, Profile]:
    from mvmci.bench.profiles import PROFILES

    if request.module:
        if names:
            raise Usage("jobs are of a --module or of a --profile", hint="leave one of them out")
        return {_name(request.module): _of_module(request, state)}
    if request != JobRequest():
        raise Usage("--input, --dir, --env and --arg are those of a --module")
    for name in names:
        if name not in PROFILES:
            close = difflib.get_close_matches(name, PROFILES, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(PROFILES)}"
            raise Usage(f"there is no profile {name!r}", hint=hint)
    return {name: PROFILES[name] for name in names or DEFAULT}


def _name(module: str) -> str:
    """Of its profile. None of ours: what is known of these would be said of it."""
    from mvmci.bench.profiles import PROFILES

    name = Path(module).stem or "module"
    return f"module {name}" if name in PROFILES else name


def _of_module(request: JobRequest, state: Path) -> Profile:
    """Jobs of the user's own. Raises Usage, BadModule."""
    from mvmci.bench.profiles import Profile, Work
    from mvmci.bench.session import as_shown

    RequestFiles(state).check(request)  # before anything is brought up

    async def make(store: Store, service_url: str) -> Work:
        del service_url
        files = RequestFiles(state)
        checked = files.check(request)
        await files.keep(store)
        return Work([await files.spec(checked, "template", store)])

    asked = ["--module", request.module]
    for name, values in (
        ("--input", [request.input]),
        ("--dir", [request.dir]),
        ("--env", request.env),
        ("--arg", request.args),
    ):
        asked += [word for value in values if value is not None for word in (name, str(value))]
    shown = as_shown(asked)
    return Profile(shlex.join(shown[1:]), make, asked=shown)


class Progress:
    """What is done now, on stderr: on a terminal in one line that changes, else a line each."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._began = time.monotonic()

    def tell(self, sentence: str) -> None:
        """Say it, with the time since the start. A warning stays."""
        seconds = int(time.monotonic() - self._began)
        line = f"{seconds // 60}:{seconds % 60:02} {one_line(sentence)}"
        self.end()
        stays = not self._live or sentence.startswith("warning: ")
        click.echo(line if stays else line[: shutil.get_terminal_size().columns - 1], err=True, nl=stays)

    def end(self) -> None:
        """What was said last is over."""
        if self._live:
            click.echo("\r\x1b[K", err=True, nl=False)


def _show(report: Report, *, as_json: bool, page: Path | None, save: Path | None) -> None:
    """Print the report, write it to files, and say so. Raises Usage."""
    from mvmci.bench import page as page_of
    from mvmci.bench.report import encode
    from mvmci.bench.table import table

    encoded = encode(report)
    click.echo(encoded if as_json else table(report))
    written = [(page, "the page", page_of.page(report).encode())] if page is not None else []
    written += [(save, "all figures to", encoded)] if save is not None else []
    for file, what, content in written:
        try:
            file.write_bytes(content)
        except OSError as failure:
            raise Usage(f"{file} was not written: {failure.strerror}") from None
        click.echo(f"wrote {what} {file}", err=True)
