"""Bottlenecks, planted on processes for real: limits of cgroups, signals, another program that computes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mvmci.system import usage
from tests.harness.waiting import until

CGROUPS = Path("/sys/fs/cgroup")
PERIOD_US = 100_000
IS_UNIFIED = (CGROUPS / "cgroup.controllers").exists()


@contextlib.contextmanager
def limited(controller: str, limits: Mapping[str, object], pids: Sequence[int]) -> Iterator[None]:
    """Processes under `limits`, the files of a cgroup and what is written there, of either version."""
    base = CGROUPS if IS_UNIFIED else CGROUPS / controller
    if IS_UNIFIED:
        (base / "cgroup.subtree_control").write_text(f"+{controller}")
    made = base / f"mvmci-planted-{os.getpid()}-{threading.get_native_id()}"
    made.mkdir()
    try:
        for file, text in limits.items():
            (made / file).write_text(str(text))
        _move(pids, made)
        yield
    finally:
        _move([int(pid) for pid in (made / "cgroup.procs").read_text().split()], base)
        until(lambda: _is_removed(made))


def _move(pids: Sequence[int], to: Path) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            (to / "cgroup.procs").write_text(str(pid))


def _is_removed(folder: Path) -> bool:
    """Whether it is gone: its processes may yet be on their way out."""
    try:
        _move([int(pid) for pid in (folder / "cgroup.procs").read_text().split()], folder.parent)
        folder.rmdir()
    except OSError:
        return not folder.exists()
    return True


def families(pids: Sequence[int]) -> list[int]:
    """These processes and all that they started."""
    return [one for pid in pids for one in (pid, *usage.descendants(pid))]


@contextlib.contextmanager
def quota(pids: Sequence[int], share: float) -> Iterator[None]:
    """All of them together have so much of one processor."""
    us = int(share * PERIOD_US)
    files: Mapping[str, object] = {"cpu.cfs_period_us": PERIOD_US, "cpu.cfs_quota_us": us}
    if IS_UNIFIED:
        files = {"cpu.max": f"{us} {PERIOD_US}"}
    with limited("cpu", files, pids):
        yield


@contextlib.contextmanager
def memory(pids: Sequence[int], size: int) -> Iterator[None]:
    """All of them together have so many bytes; the kernel ends one where they want more. Not the first, which
    would be started again, and without a limit: the others, and so what they start, go before it."""
    for pid in pids[1:]:
        with contextlib.suppress(OSError):  # it has ended
            Path(f"/proc/{pid}/oom_score_adj").write_text("500")
    with limited("memory", {"memory.max" if IS_UNIFIED else "memory.limit_in_bytes": size}, pids):
        yield


@contextlib.contextmanager
def slow_disk(pids: Sequence[int], folder: Path, writes: int) -> Iterator[None]:
    """They write to the disk of `folder` so many times a second."""
    number = folder.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    if IS_UNIFIED:
        limits = ("io", {"io.max": f"{device} wiops={writes}"})
    else:
        limits = ("blkio", {"blkio.throttle.write_iops_device": f"{device} {writes}"})
    with limited(*limits, pids):
        yield


@contextlib.contextmanager
def stuttering(pids: Sequence[int], *, stopped_s: float, runs_s: float) -> Iterator[None]:
    """They are stopped again and again, and run in between."""
    ended = threading.Event()

    def stutter() -> None:
        while not ended.is_set():
            for signum, pause_s in ((signal.SIGSTOP, stopped_s), (signal.SIGCONT, runs_s)):
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signum)
                ended.wait(pause_s)

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Another program computes all the time, on one processor."""
    # It is not our child: of those, a bench would think that they are its own.
    command = f"{sys.executable} -c 'while True: pass' >/dev/null & echo $!"
    told = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, check=True)
    try:
        yield
    finally:
        os.kill(int(told.stdout), signal.SIGKILL)
