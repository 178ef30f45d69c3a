"""Stands for mvmci in these tests: a supervisor of units, or a unit that does as its options say.

    program.py PACE supervise --cluster C [--attached PID]
    program.py PACE ROLE --cluster C [--name N] [--exit CODE] [--live S] [--stubborn N] [--leave S]
                         [--listen HOST:PORT] [--deaf]

Each unit appends lines to `said` in the cluster's folder, one write each: `<name> began <pid> <time>`,
and for a SIGTERM that it takes `<name> asked …`, and `<name> ended …` when it goes because of one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pace", type=json.loads)
    parser.add_argument("role")
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--attached", type=int)
    parser.add_argument("--name", default="broker-1")
    parser.add_argument("--exit", type=int)
    parser.add_argument("--live", type=float, default=0.0)
    parser.add_argument("--stubborn", type=int, default=0)
    parser.add_argument("--leave", type=float, default=0.0)
    parser.add_argument("--print", default="")
    parser.add_argument("--listen")
    parser.add_argument("--deaf", action="store_true")  # does not listen there
    args = parser.parse_args()
    root = Path(os.environ["MVMCI_STATE"])
    if args.role == "supervise":
        supervisor(root, args)
    else:
        unit(root / args.cluster / "said", args)


def supervisor(root: Path, args: argparse.Namespace) -> None:
    import asyncio  # a unit starts sooner without

    from mvmci.runtimes.local.supervisor import Pace, supervise
    from mvmci.system.linux import die_with
    from mvmci.system.processes import clean_environment

    if args.attached is not None:
        die_with(args.attached, signal.SIGTERM)
    program = [sys.executable, "-S", "-E", __file__, json.dumps(args.pace)]
    pace = Pace(**args.pace)
    ready = lambda: os.write(1, b"ready\n")  # noqa: E731
    asyncio.run(supervise(root / args.cluster, program, clean_environment(root), ready=ready, pace=pace))


def unit(said: Path, args: argparse.Namespace) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    file = os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def say(what: str) -> None:
        os.write(file, f"{args.name} {what} {os.getpid()} {time.monotonic()}\n".encode())

    if args.listen and not args.deaf:
        host, _, port = args.listen.rpartition(":")
        listener = socket.create_server((host, int(port)))  # noqa: F841 (as long as this process)
    say("began")
    if args.print:
        print(args.print, flush=True)
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
