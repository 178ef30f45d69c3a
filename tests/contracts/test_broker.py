"""What `mvmci.broker` promises of the server that it starts, and what that server answers to batches."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from pathlib import Path

import pytest

from mvmci import broker
from mvmci.broker import Broker, serve
from mvmci.errors import StoreUnavailable
from mvmci.stores.nats import ensure, remove
from mvmci.stores.nats.append import BATCH_MIN
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link
from tests.conftest import open_nats

LONG_S = 20.0
OPEN_BATCHES = 60  # more than the server holds for a stream

STARTS_ONE = """
import asyncio, sys
from pathlib import Path
from mvmci.broker import serve

async def main():
    async with serve(Path(sys.argv[1])) as url:
        print(url, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def answers(url: str) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def test_the_broker_ends_with_its_block_and_keeps_its_data(tmp_path: Path) -> None:
    async with serve(tmp_path / "broker") as url:
        await ensure(url, "demo", store_bytes=64 << 20)
        store = await open_nats(url, "demo", "u1")
        await store.journals.append("a", "spec", "q", b"x", message_id="m", expect=0)
        await store.close()
    assert not await answers(url)
    async with serve(tmp_path / "broker") as url:
        store = await open_nats(url, "demo", "u1")
        assert len(await store.journals.read("a")) == 1
        await store.close()


async def test_the_broker_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STARTS_ONE, tmp_path / "broker", stdout=asyncio.subprocess.PIPE,
        cwd=Path(broker.__file__).parent.parent,
    )  # fmt: skip
    assert parent.stdout is not None
    url = (await parent.stdout.readline()).decode().strip()
    assert await answers(url)
    os.kill(parent.pid, signal.SIGKILL)
    await parent.wait()
    async with asyncio.timeout(LONG_S):
        while await answers(url):  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(0.02)


async def test_a_server_that_does_not_sync_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relaxed = Broker(tmp_path / "broker")
    config = relaxed._config().replace("sync_interval: always", "sync_interval: 2m")
    monkeypatch.setattr(relaxed, "_config", lambda: config)
    with pytest.raises(StoreUnavailable, match="does not sync"):
        await relaxed.start()
    assert relaxed.process is not None
    assert relaxed.process.returncode is not None


async def test_a_server_that_cannot_start_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broker").mkdir()
    (tmp_path / "broker" / "store").write_text("in the way")
    with pytest.raises(StoreUnavailable, match="did not start"):
        await Broker(tmp_path / "broker").start()


async def test_what_it_keeps_is_its_owners_alone(tmp_path: Path) -> None:
    async with serve(tmp_path / "broker"):
        assert (tmp_path / "broker").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "broker" / "nats.conf").stat().st_mode & 0o777 == 0o600


async def test_appends_go_out_plainly_when_too_many_batches_are_open(broker_url: str) -> None:
    cluster = f"t-{secrets.token_hex(4)}"
    await ensure(broker_url, cluster, store_bytes=64 << 20)
    store = await open_nats(broker_url, cluster, "u1")
    hog = Link(broker_url, "hog")
    await hog.open()
    for number in range(OPEN_BATCHES):
        headers = {"Nats-Batch-Id": f"b{number}", "Nats-Batch-Sequence": "1"}
        await hog.publish(Layout(cluster).message(f"hog{number}", "spec", "q"), b"x", headers=headers)
    await hog.api("INFO")  # they have arrived
    writes = [
        store.journals.append(f"j{i}", "spec", "q", b"x", message_id="m", expect=0)
        for i in range(4 * BATCH_MIN)
    ]
    assert len(set(await asyncio.gather(*writes))) == 4 * BATCH_MIN
    await hog.close()
    await store.close()
    await remove(broker_url, cluster)
