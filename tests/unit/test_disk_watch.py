"""The watch beside the broker, by a clock of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mvmci.roles import disk_watch

SERVER = 4_000_000  # a process that stands for nats-server


def test_a_broker_starts_anew_only_when_there_has_been_room_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / disk_watch.LOG).write_bytes(b"[1] [ERR] write 1.blk: no space left on device\n")
    looks, now, ended = 0, 0.0, []
    free = {10: disk_watch.ROOM_BYTES, 12: 0, 20: disk_watch.ROOM_BYTES}  # from that look on

    def sleep(seconds: float) -> None:
        nonlocal looks, now
        looks, now = looks + 1, now + seconds

    def room(_: str) -> int:
        return free[max((look for look in free if look <= looks), default=12)]

    monkeypatch.setattr(disk_watch, "room", room)
    monkeypatch.setattr(disk_watch.time, "sleep", sleep)
    monkeypatch.setattr(disk_watch.time, "monotonic", lambda: now)
    monkeypatch.setattr(os, "getppid", lambda: SERVER)
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.append((pid, looks)))
    disk_watch.watch(str(tmp_path), SERVER, 0)
    assert ended == [(SERVER, 20 + disk_watch.QUIET_S / disk_watch.EVERY_S)]
