"""Stands for mvmci in tests of runtimes: a supervisor of units, or a unit that does as its options say.

    stub.py host --cluster C --state DIR [--service S]
    stub.py PACE supervise --cluster C [--attached PID] [--resume | --take-over] [--check]
    stub.py [PACE] ROLE [--config FILE | --cluster C --name N] [--exit CODE] [--live S] [--stubborn N]
                        [--leave S] [--print TEXT] [--listen HOST:PORT] [--deaf]

A supervisor that has just become this program waits for the lock of `hold` in the state directory, if that
is there.

Each unit appends lines to `said` in the state directory, one write each: `<name> began <pid> <time>`, and
for a SIGTERM that it takes `<name> asked …`, and `<name> ended …` when it goes because of one.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import socket
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

# Of supervisors: tests are in a hurry.
PACE = {"first_pause_s": 0.05, "longest_pause_s": 0.4, "healthy_s": 30, "hurry_s": 2.0, "look_every_s": 0.05}


class Said(NamedTuple):
    name: str
    what: str
    pid: int
    at: float


def read(file: Path) -> list[Said]:
    """What the units said, in its order."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [Said(name, what, int(pid), float(at)) for name, what, pid, at in map(str.split, lines)]


def write_zipapp(path: Path, build: str = "", *, here: bool = False) -> None:
    """This program as the one file that goes into an image; another `build` has another digest. One that
    stays `here` finds mvmci where these tests do, however it is started."""
    source = Path(__file__).read_text()
    if here:
        source = f"import sys\nsys.path[:0] = {[*map(os.path.abspath, sys.path)]}\n{_MAIN}"
    with zipfile.ZipFile(path, "w") as archive:
        # Of one date, so that one build has one digest, and one image.
        archive.writestr(zipfile.ZipInfo("__main__.py"), source)
        archive.comment = build.encode()


_MAIN = "from tests.harness import stub\nstub.main()\n"


def main() -> None:
    given = sys.argv[1:]
    pace = json.loads(given.pop(0)) if given[0].startswith("{") else {}
    if given[0] == "version":  # an image is made, and what was unpacked is looked for
        (Path.home() / ".cache" / "mvmci").mkdir(parents=True)
        return
    if given[0] == "host":
        host(given[1:])
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--take-over", action="store_true")
    parser.add_argument("--cluster")
    parser.add_argument("--attached", type=int)
    parser.add_argument("--name")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--token-file")
    parser.add_argument("--grace")
    parser.add_argument("--queue")
    parser.add_argument("--exit", type=int)
    parser.add_argument("--live", type=float, default=0.0)
    parser.add_argument("--stubborn", type=int, default=0)
    parser.add_argument("--leave", type=float, default=0.0)
    parser.add_argument("--print", default="")
    parser.add_argument("--listen")
    parser.add_argument("--deaf", action="store_true")  # does not listen there
    args = parser.parse_args(given)
    root = Path(os.environ["MVMCI_STATE"])
    if args.role == "supervise":
        supervisor(root, args, pace)
    else:
        unit(root / "said", args)


def supervisor(root: Path, args: argparse.Namespace, pace: dict[str, float]) -> None:
    import asyncio  # a unit starts sooner without

    import msgspec

    from mvmci.runtimes.local.messages import Desired, Handover, Start, desired_by
    from mvmci.runtimes.local.supervisor import supervise
    from mvmci.runtimes.local.unit_process import Pace
    from mvmci.system.linux import die_with
    from mvmci.system.processes import clean_environment

    if args.check:  # a supervisor tries what is to be its next program
        return
    if args.attached is not None:
        die_with(args.attached, signal.SIGTERM)
    program = [sys.executable, sys.argv[0], json.dumps(pace)]
    begin: Desired | Handover | None
    if args.take_over:
        if (root / "hold").exists():
            with open(root / "hold") as held:
                fcntl.flock(held, fcntl.LOCK_SH)
        begin = msgspec.json.decode(sys.stdin.buffer.read(), type=Handover)
    elif args.resume:
        begin = None
    else:
        begin = desired_by(msgspec.json.decode(sys.stdin.buffer.read(), type=Start), program)
    attached = args.attached is not None

    def ready() -> None:
        if not args.take_over:  # who reads that has gone
            os.write(1, b"ready\n")

    running = supervise(
        root / args.cluster,
        begin,
        program,
        clean_environment(root),
        ready=ready,
        options=("--attached", str(args.attached)) if attached else (),
        kept=not attached,
        pace=Pace(**pace),
    )
    asyncio.run(running)


def host(given: list[str]) -> None:
    """The agent of a host, whose supervisor and units are stubs."""
    import asyncio

    from mvmci.runtimes.local.agent import serve_stdio
    from mvmci.runtimes.local.runtime import Local

    parser = argparse.ArgumentParser()
    for name in ("--cluster", "--state", "--service"):
        parser.add_argument(name)
    args = parser.parse_args(given)
    program = [sys.executable, sys.argv[0], json.dumps(PACE)]
    asyncio.run(serve_stdio(Local(Path(args.state), args.cluster, program)))


def unit(said: Path, args: argparse.Namespace) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    file = os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    name = args.name
    if args.config is not None:  # it is in its unit's folder, or has its unit's name
        name = args.config.parent.name if args.config.stem == "config" else args.config.stem

    def say(what: str) -> None:
        os.write(file, f"{name} {what} {os.getpid()} {time.monotonic()}\n".encode())

    if args.listen and not args.deaf:
        host, _, port = args.listen.rpartition(":")
        listener = socket.create_server((host, int(port)))  # noqa: F841 (as long as this process)
    if args.print:
        print(args.print, flush=True)
    say("began")
    if args.exit is not None:
        time.sleep(args.live)
        sys.exit(args.exit)
    for _ in range(args.stubborn + 1):
        signal.sigwait({signal.SIGTERM})
        say("asked")
    time.sleep(args.leave)
    say("ended")


if __name__ == "__main__":
    main()
