"""What is secret stays where it belongs: it is in no argument, environment, log or journal."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from mvmci.cluster.identity import Identity, decode_ticket
from tests.faults.chaos.conftest import Make, join
from tests.faults.chaos.judge import judge
from tests.faults.chaos.load import Client
from tests.faults.chaos.outside import Outside
from tests.harness.waiting import LONG_S

HEADER = "Bearer planted-7f3a9c51d2e84b06"
# What lies there is meant to be secret.
KEPT_IN = ("keys", "ticket", "identity.json", "config.json", "client.json")
TOPOLOGY = """
cluster: demo
workers: {{count: 2, slots: 2}}
allow: {{http: ["{allow}"]}}
"""


def seeds(folder: Path) -> Iterator[str]:
    """Every private key of a cluster's folder."""
    for name in ("operator", "account", "system"):
        yield (folder / "keys" / name).read_text().strip()
    for name in ("ca.key", "broker.key"):
        yield (folder / "keys" / name).read_text().splitlines()[1]
    for path in (*folder.glob("units/*/identity.json"), folder / "client.json"):
        yield msgspec.json.decode(path.read_bytes(), type=Identity).login.seed


def places(*folders: Path) -> Iterator[tuple[str, bytes]]:
    """Where a secret has no business to be: processes, and the files that clusters leave."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            for part in ("cmdline", "environ"):
                try:
                    yield f"{process / part}", (process / part).read_bytes()
                except OSError:
                    pass  # it is gone
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not {*path.relative_to(folder).parts} & {*KEPT_IN}:
                with suppress(FileNotFoundError):  # it is gone
                    yield str(path), path.read_bytes()


async def test_no_argument_environment_log_or_journal_has_a_ticket_a_key_or_a_header(
    make: Make, closing: AsyncExitStack, tmp_path: Path
) -> None:
    outside = await closing.enter_async_context(Outside().serve())
    cluster = make(TOPOLOGY.format(allow=outside.allow))
    await asyncio.to_thread(cluster.up)
    tickets = [(cluster.folder / "ticket").read_text().strip()]
    for role in ("worker", "client"):
        done = await asyncio.to_thread(cluster.mvmci, "ticket", "create", "--role", role)
        assert done.code == 0, done
        tickets.append(done.text.strip())

    elsewhere = replace(cluster.mvmci, state=tmp_path / "elsewhere")
    read, write = os.pipe()
    os.write(write, tickets[1].encode())
    os.close(write)
    by_file = cluster.mvmci.start("worker", "--join", f"@{cluster.folder / 'ticket'}", "--name", "by-file")
    by_pipe = elsewhere.start("worker", "--join", "-", "--name", "by-pipe", stdin=read)
    os.close(read)
    joined = [by_file, by_pipe]
    try:
        for worker in joined:
            await asyncio.to_thread(worker.hears, "has joined demo", "err")
        done = await asyncio.to_thread(elsewhere, "login", "-", stdin=tickets[2].encode())
        assert done.code == 0, done
        client = Client((await join(cluster, closing)).store, outside, random.Random(1))
        await client.prepare("script")
        secret = {"Authorization": HEADER[::-1]}
        post = {"http": {"method": "POST", "url": f"{outside.url}/s/once/0", "secrets": secret}}
        await client.workflow([post, {"log": "sent"}], "s")
        assert await judge(client.store, client.accepted, outside, LONG_S) == []
        assert outside.asked["/s/once/0"][0].authorization == HEADER

        planted = [HEADER, HEADER.split()[1], *tickets, *seeds(cluster.folder)]
        planted += [decode_ticket(ticket).login.seed for ticket in tickets]
        planted += [
            msgspec.json.decode(path.read_bytes(), type=Identity).login.seed
            for path in elsewhere.state.glob("demo/**/*.json")
            if path.name in KEPT_IN
        ]
        assert all(len(secret) > 16 for secret in planted)
        looked_at = list(places(cluster.mvmci.state, elsewhere.state))
        found = {where for where, data in looked_at for secret in planted if secret.encode() in data}
        assert found == set()
        assert any(b"sent" in data for where, data in looked_at if "/broker/store/" in where), "no journal"
        assert any(data for where, data in looked_at if where.endswith("/log")), "no log"
        assert sum("worker" in where or b"\0worker\0" in data for where, data in looked_at) >= 4
        said = b"".join(worker.said(stream) for worker in joined for stream in ("out", "err"))
        assert not [secret for secret in planted if secret.encode() in said]
    finally:
        for worker in joined:
            worker.signal(signal.SIGTERM)
        for worker in joined:
            await asyncio.to_thread(worker.end)
