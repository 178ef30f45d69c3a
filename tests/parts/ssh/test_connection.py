"""What runs on a host through a connection, and what becomes of it when the host goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mvmci.cluster.topology import HostSection
from mvmci.errors import HostAway, HostRefused, MvmciError
from mvmci.runtimes.ssh import channel as channels
from mvmci.runtimes.ssh import dial
from mvmci.runtimes.ssh.channel import Channel
from mvmci.runtimes.ssh.connection import CHANNELS_MAX, Connection
from mvmci.system.tasks import cancel
from tests.harness.proxy import Proxy
from tests.harness.sshd import Sshd, serve
from tests.harness.waiting import until_true
from tests.parts.ssh.conftest import Connect


async def test_a_command_gets_its_input_and_tells_its_output_errors_and_code(
    sshd: Sshd, connect: Connect
) -> None:
    h1 = await connect(h1=sshd.section()).connect("h1")
    ran = await h1.run(["sh", "-c", "cat; echo no >&2; exit 3"], b"\0\xff" * 1_000_000)
    assert (ran.code, ran.out, ran.err) == (3, b"\0\xff" * 1_000_000, b"no\n")
    ran = await h1.run(["printf", "%s\n", "it's", "a  b", "$HOME", "*", ""])
    assert ran.out == b"it's\na  b\n$HOME\n*\n\n"
    assert (await h1.run(["sh", "-c", "kill -9 $$"])).code == 128 + 9
    assert (await h1.run(["/nothing/there"])).code == 127


async def test_a_command_may_end_without_reading_what_it_is_sent(sshd: Sshd, connect: Connect) -> None:
    h1 = await connect(h1=sshd.section()).connect("h1")
    assert (await h1.run(["true"], bytes(32 << 20))).code == 0


async def test_there_is_one_connection_to_a_host_and_a_new_one_after_it_was_lost(
    sshd: Sshd, connect: Connect
) -> None:
    connections = connect(h1=sshd.section())
    first, second = await asyncio.gather(connections.connect("h1"), connections.connect("h1"))
    assert first is second
    await first.close()
    again = await connections.connect("h1")
    assert (await again.run(["echo", "here"])).out == b"here\n"


async def test_what_a_login_shell_prints_is_not_what_the_command_printed(
    tmp_path: Path, home: Path, key: str, connect: Connect
) -> None:
    shell = """sh -c 'printf "Welcome\\n\\0\\nno line"; eval "$SSH_ORIGINAL_COMMAND"'"""
    async with serve(tmp_path / "chatty", settings={"ForceCommand": shell}) as sshd:
        sshd.authorized_keys.write_text(key + "\n")
        h1 = await connect(h1=sshd.section(host_key=sshd.host_keys[0])).connect("h1")
        assert (await h1.run(["cat"], b"mine")).out == b"mine"
        async with h1.channel(["cat"]) as channel:
            await channel.write(b"one\ntwo\n")
            assert [await channel.readline(), await channel.readline()] == [b"one\n", b"two\n"]


@pytest.mark.parametrize(
    ("shell", "why"),
    [
        ("echo This account is not available; exit 1", "it says: This account is not available"),
        ("exit 7", "it ends with code 7"),
        ("yes", "its login shell prints without end"),
    ],
)
async def test_a_host_that_lets_us_in_and_runs_nothing_is_said_to(
    tmp_path: Path, key: str, connect: Connect, shell: str, why: str
) -> None:
    async with serve(tmp_path / "sshd", settings={"ForceCommand": shell}) as sshd:
        sshd.authorized_keys.write_text(key + "\n")
        h1 = await connect(h1=sshd.section(host_key=sshd.host_keys[0])).connect("h1")
        with pytest.raises(HostRefused, match=why):
            await h1.run(["true"])


async def test_thirty_commands_at_once_all_run_though_sshd_opens_ten_sessions(
    sshd: Sshd, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, close, open_at_once = Connection._start, Channel.close, [0]

    async def starting(connection: Connection, command: Sequence[str]) -> Any:
        open_at_once.append(open_at_once[-1] + 1)
        return await start(connection, command)

    async def closing(channel: Channel) -> None:
        await close(channel)
        open_at_once.append(open_at_once[-1] - 1)

    monkeypatch.setattr(Connection, "_start", starting)
    monkeypatch.setattr(Channel, "close", closing)
    h1 = await connect(h1=sshd.section()).connect("h1")
    ran = await asyncio.gather(*(h1.run(["echo", str(number)]) for number in range(3 * CHANNELS_MAX)))
    assert [one.out for one in ran] == [b"%d\n" % number for number in range(3 * CHANNELS_MAX)]
    assert max(open_at_once) == CHANNELS_MAX
    assert open_at_once[-1] == 0


async def test_an_sshd_that_opens_no_session_is_said_to(tmp_path: Path, key: str, connect: Connect) -> None:
    async with serve(tmp_path / "sshd", settings={"MaxSessions": 0}) as sshd:
        sshd.authorized_keys.write_text(key + "\n")
        h1 = await connect(h1=sshd.section(host_key=sshd.host_keys[0])).connect("h1")
        with pytest.raises(HostRefused, match="opens no session"):
            await h1.run(["true"])


async def test_thirty_connections_at_once_are_all_made_and_none_is_dropped(
    tmp_path: Path, key: str, connect: Connect
) -> None:
    """Ten at a time; some more leave room for what sshd has not yet noticed to be let in."""
    async with serve(tmp_path / "sshd", settings={"MaxStartups": "20:100:20"}) as sshd:
        sshd.authorized_keys.write_text(key + "\n")
        hosts = {f"h{number}": sshd.section(host_key=sshd.host_keys[0]) for number in range(30)}
        connections = connect(**hosts)
        made = await asyncio.gather(*(connections.connect(name) for name in hosts))
        assert len(set(made)) == 30
        assert not any("drop connection" in line for line in sshd.log)


async def test_an_sshd_that_drops_us_while_others_log_in_is_asked_again(
    tmp_path: Path, key: str, connect: Connect
) -> None:
    async with serve(tmp_path / "sshd", settings={"MaxStartups": "1:100:1"}) as sshd:
        sshd.authorized_keys.write_text(key + "\n")
        other, waiting = await asyncio.open_connection("127.0.0.1", sshd.port)  # logs in for ever
        assert (await other.readline()).startswith(b"SSH-2.0")
        connecting = asyncio.ensure_future(connect(h1=sshd.section(host_key=sshd.host_keys[0])).connect("h1"))
        await until_true(lambda: any("drop connection" in line for line in sshd.log))
        waiting.close()
        await waiting.wait_closed()
        assert (await (await connecting).run(["true"])).code == 0


async def test_a_host_that_goes_away_ends_what_runs_there(sshd: Sshd, connect: Connect) -> None:
    async with Proxy(f"ssh://127.0.0.1:{sshd.port}").serve() as proxy:
        port = int(proxy.url.rpartition(":")[2])
        section = HostSection(address="127.0.0.1", port=port, host_key=sshd.host_keys[0])
        connections = connect(h1=section)
        h1 = await connections.connect("h1")
        running = asyncio.ensure_future(h1.run(["sh", "-c", "cat >/dev/null; sleep 1000"]))
        sending = asyncio.ensure_future(h1.run(["sleep", "1000"], bytes(64 << 20)))
        async with h1.channel(["sh", "-c", "echo ready; sleep 1000"]) as channel:
            assert await channel.readline() == b"ready\n"
            proxy.hole()
            # It pings in a hurry now, and not before: a busy sshd may be silent for as long.
            h1._link.set_keepalive(h1._link._keepalive_interval / 40)
            for waiting in (running, sending, asyncio.ensure_future(channel.readline())):
                with pytest.raises(HostAway, match="the connection to h1 is lost"):
                    await waiting
        with pytest.raises(HostAway):
            await h1.run(["true"])
        proxy.cut()
        proxy.heal()
        assert (await (await connections.connect("h1")).run(["true"])).code == 0


async def test_a_host_that_is_away_keeps_nobody_from_leaving(
    sshd: Sshd, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "ALIVE_S", 100_000)  # nobody notices that it is
    async with Proxy(f"ssh://127.0.0.1:{sshd.port}").serve() as proxy:
        port = int(proxy.url.rpartition(":")[2])
        connections = connect(h1=HostSection(address="127.0.0.1", port=port, host_key=sshd.host_keys[0]))
        h1 = await connections.connect("h1")
        running = asyncio.ensure_future(h1.run(["sleep", "1000"], bytes(64 << 20)))
        async with h1.channel(["sh", "-c", "echo ready; sleep 1000"]) as channel:
            assert await channel.readline() == b"ready\n"
            proxy.hole()
            await cancel(running)
        await connections.close()


async def test_an_sshd_that_is_killed_ends_what_runs_there(
    tmp_path: Path, key: str, connect: Connect
) -> None:
    async with serve(tmp_path / "sshd") as sshd:
        sshd.authorized_keys.write_text(key + "\n")
        async with Proxy(f"ssh://127.0.0.1:{sshd.port}").serve() as proxy:
            section = HostSection(
                address="127.0.0.1", port=int(proxy.url.rpartition(":")[2]), host_key=sshd.host_keys[0]
            )
            h1 = await connect(h1=section).connect("h1")
            running = asyncio.ensure_future(h1.run(["sleep", "1000"]))
            async with h1.channel(["cat"]) as channel:
                await channel.write(b"here\n")
                assert await channel.readline() == b"here\n"
                proxy.cut()
                with pytest.raises(HostAway):
                    await channel.readline()
            with pytest.raises(HostAway):
                await running


async def test_a_command_that_prints_without_end_is_ended(sshd: Sshd, connect: Connect) -> None:
    h1 = await connect(h1=sshd.section()).connect("h1")
    with pytest.raises(MvmciError, match="more than 8 MiB"):
        await h1.run(["yes"])
    ran = await h1.run(["sh", "-c", "yes | head -c 10000000 >&2; echo last >&2"])
    assert len(ran.err) == channels.WORDS_BYTES_MAX
    assert ran.err.endswith(b"last\n")


async def test_a_channel_that_is_left_ends_its_command_and_frees_its_place(
    sshd: Sshd, connect: Connect
) -> None:
    h1 = await connect(h1=sshd.section()).connect("h1")
    for _ in range(2 * CHANNELS_MAX):
        async with h1.channel(["cat"]) as channel:
            await channel.write(b"x\n")
            assert await channel.readline() == b"x\n"
    async with h1.channel(["sh", "-c", "cat; echo end; exit 5"]) as channel:
        channel.end()
        assert await channel.readline() == b"end\n"
        assert await channel.readline() == b""
        assert (await channel.wait()).code == 5


async def test_what_several_write_at_once_does_not_mix(sshd: Sshd, connect: Connect) -> None:
    h1 = await connect(h1=sshd.section()).connect("h1")
    lines = [bytes([letter]) * (1 << 20) + b"\n" for letter in b"abc"]
    async with h1.channel(["cat"]) as channel:
        writing = asyncio.gather(*map(channel.write, lines))
        assert [await channel.readline() for _ in lines] == lines
        await writing


async def test_who_is_cancelled_in_the_middle_of_writing_leaves_no_half(sshd: Sshd, connect: Connect) -> None:
    h1 = await connect(h1=sshd.section()).connect("h1")
    async with h1.channel(["sh", "-c", "read line; echo read; cat | wc -c"]) as channel:
        await channel.write(b"whole\n")
        writing = asyncio.ensure_future(channel.write(bytes(64 << 20)))
        assert await channel.readline() == b"read\n"
        await cancel(writing)
        with pytest.raises(HostAway, match="has ended"):
            await channel.write(b"the rest\n")
    async with h1.channel(["sleep", "1000"]) as channel:
        short = asyncio.ensure_future(channel.write(b"short\n"))
        await asyncio.sleep(0)
        await cancel(short)
        await channel.write(b"more\n")


async def test_connections_that_are_closed_end_what_runs(sshd: Sshd, connect: Connect) -> None:
    connections = connect(h1=sshd.section())
    h1 = await connections.connect("h1")
    async with h1.channel(["cat"]) as channel:
        await channel.write(b"here\n")
        assert await channel.readline() == b"here\n"
        running = asyncio.ensure_future(h1.run(["sleep", "1000"]))
        await connections.close()
        with pytest.raises(HostAway):
            await channel.readline()
        with pytest.raises(HostAway):
            await running
