"""`python -m benchmarks`: mvmci against its promises, and beside what a user would pick instead.

    ./just bench                  everything, about ten minutes
    ./just bench --quick          the same in under three minutes, for a look
    ./just bench --write          and put tables and picture into docs/figures.md, what has a target
                                  into the README
    ./just bench accesses         the four ways to an engine; with --write, into docs/deployment.md
    ./just bench growth [--long]  what becomes slower when there is more of something; with --write,
                                  into docs/growth.md

Everything lies in one folder, beneath --folder, and so on one disk. Ctrl-C ends all that was started.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import accesses, cluster, compare, engine, growth, picture, report
from benchmarks.peers import PEERS
from benchmarks.processes import ROOT
from benchmarks.program import Cluster

Result = tuple[str, dict[str, Any]]  # as Markdown, and the raw figures
PICTURE = Path("benchmarks") / "bench.svg"
FIGURES = Path("docs") / "figures.md"
GUIDE = Path("docs") / "deployment.md"
GROWTH = Path("docs") / "growth.md"


@dataclass(frozen=True)
class Scale:
    """How long it takes."""

    engine: engine.Scale
    cluster: cluster.Scale
    compare: compare.Scale


FULL = Scale(
    engine.Scale(rounds=3, light=66, commands=20, effects=500, replayed=5000, starts=10),
    cluster.Scale(rounds=3, batch=10_000, alone=200, effects=500, replayed=5000, starts=20),
    compare.Scale(rounds=3, seconds=3, alone=200),
)
QUICK = Scale(
    engine.Scale(rounds=2, light=30, commands=10, effects=100, replayed=5000, starts=3),
    cluster.Scale(rounds=2, batch=2000, alone=100, effects=200, replayed=5000, starts=4),
    compare.Scale(rounds=2, seconds=1, alone=40),
)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder for all that is written, removed with what still runs in it."""
    folder = Path(tempfile.mkdtemp(prefix="mvmci-bench-", dir=parent)).resolve()
    folder.chmod(0o711)  # slots and PostgreSQL run as other users
    try:
        yield folder
    finally:
        for state in folder.glob("*/state"):
            Cluster(state.parent).down(purge=True)
        shutil.rmtree(folder)


def say(text: str) -> None:
    """How far it is."""
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(
        prog="./just bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=["all", "accesses", "growth"], default="all")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--long", action="store_true", help="growth: also 200,000 jobs in one go")
    parser.add_argument("--write", action="store_true", help="into the page that it belongs to")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the raw figures there")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on which disk")
    return parser.parse_args()


def everything(folder: Path, scale: Scale, facts: dict[str, Any], command: str, *, write: bool) -> Result:
    """mvmci line by line, and all side by side."""
    say("mvmci: the engine alone")
    alone = asyncio.run(engine.measure(folder / "engine", scale.engine))
    say("mvmci: a cluster")
    lines = [*asyncio.run(cluster.Lines(folder / "cluster", scale.cluster).measure()), *alone]
    outcomes = compare.compare(folder, list(PEERS), scale.compare)
    if outcomes["mvmci"].missing:
        raise RuntimeError(outcomes["mvmci"].missing)
    text = report.markdown(lines, outcomes, facts, command, str(".." / PICTURE))
    if write:
        (ROOT / PICTURE).write_text(picture.draw(outcomes))
        report.put_into(ROOT / FIGURES, text)
        report.put_into(ROOT / "README.md", report.promises(lines, outcomes, facts, command))
    return text, {"lines": lines, "peers": outcomes}


def side_by_side(
    folder: Path, scale: compare.Scale, facts: dict[str, Any], command: str, *, write: bool
) -> Result:
    """The four ways to an engine."""
    outcomes = accesses.compare(folder, scale)
    text = accesses.markdown(outcomes, facts, command)
    if write:
        report.put_into(ROOT / GUIDE, text, accesses.BEGIN, accesses.END)
    return text, {"accesses": outcomes}


def grow(
    folder: Path, scale: growth.Scale, facts: dict[str, Any], command: str, *, long: bool, write: bool
) -> Result:
    """What becomes slower when there is more of something."""
    sections = asyncio.run(growth.measure(folder, scale, long=long))
    text = growth.markdown(sections, facts, command)
    if write:
        report.put_into(ROOT / GROWTH, text, growth.BEGIN, growth.END)
    return text, {"growth": sections}


def main() -> None:
    """Measure, print, and write where that is asked for."""
    asked = arguments()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    given = [asked.part] * (asked.part != "all") + ["--quick"] * asked.quick + ["--long"] * asked.long
    command = " ".join(["./just bench", *given])
    with scratch(asked.folder) as folder:
        facts = report.machine(folder)
        if asked.part == "growth":
            scale = growth.QUICK if asked.quick else growth.FULL
            text, raw = grow(folder, scale, facts, command, long=asked.long, write=asked.write)
        elif asked.part == "accesses":
            rounds = (QUICK if asked.quick else FULL).compare
            text, raw = side_by_side(folder, rounds, facts, command, write=asked.write)
        else:
            text, raw = everything(folder, QUICK if asked.quick else FULL, facts, command, write=asked.write)
    print(text)
    if asked.json:
        kept = json.dumps({"machine": facts, "command": command, **raw}, indent=1, default=asdict)
        asked.json.write_text(kept + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("interrupted; all that was started has ended")
        sys.exit(130)
