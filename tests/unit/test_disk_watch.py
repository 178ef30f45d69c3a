"""The watch beside the broker, by a clock of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mvmci.roles import disk_watch

SERVER = 4_000_000  # a process that stands for nats-server
LOOKS_MAX = 100


@pytest.fixture
def ended_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], int]:
    """At which look the watch stops the server; before each, what it is given is told the number of that."""

    def watched(before: Callable[[int], None]) -> int:
        looks, stopped = 0, []

        def sleep(_: float) -> None:
            nonlocal looks
            looks += 1
            assert looks < LOOKS_MAX, "the server was never stopped"
            before(looks)

        def kill(pid: int, _: int) -> None:
            assert pid == SERVER
            stopped.append(looks)

        monkeypatch.setattr(disk_watch.time, "sleep", sleep)
        monkeypatch.setattr(disk_watch.time, "monotonic", lambda: looks * disk_watch.EVERY_S)
        monkeypatch.setattr(os, "getppid", lambda: SERVER)
        monkeypatch.setattr(os, "kill", kill)
        disk_watch.watch(str(tmp_path), SERVER, 0)
        (at,) = stopped
        return at

    return watched


@pytest.mark.parametrize("kept", [None, 20], ids=["said whole", "said as far as there was room"])
def test_a_broker_starts_anew_only_when_there_has_been_room_for_a_while(
    kept: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ended_at: Callable[[Callable[[int], None]], int],
) -> None:
    said = b"[1] [ERR] write 1.blk: no space left on device\n"
    (tmp_path / disk_watch.LOG).write_bytes(said[:kept])
    free = 0

    def before(look: int) -> None:
        nonlocal free
        free = disk_watch.ROOM_BYTES if look in (10, 11) or look >= 20 else 0

    monkeypatch.setattr(disk_watch, "room", lambda _: free)
    assert ended_at(before) == 20 + disk_watch.QUIET_S / disk_watch.EVERY_S
    assert b"no space left on device" in (tmp_path / disk_watch.TROUBLE).read_bytes()


def test_a_broker_whose_store_was_removed_starts_anew(
    tmp_path: Path, ended_at: Callable[[Callable[[int], None]], int]
) -> None:
    store = tmp_path / "store" / "jetstream"

    def before(look: int) -> None:
        if look == 5:  # a server takes a while to make it
            store.mkdir(parents=True)
        if look == 9:
            shutil.rmtree(store.parent)

    assert ended_at(before) == 9
