"""A host that lets us in and then answers what it likes, or nothing: a sentence, and no endless wait."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.deployment import RoleName, Unit, UnitConfig
from mvmci.cluster.topology import HostSection, read_topology
from mvmci.errors import HostRefused, MvmciError, StoreUnavailable
from mvmci.runtime import Provisioning
from mvmci.runtimes.local.agent import Key
from mvmci.runtimes.ssh.runtime import Ssh
from mvmci.trust.authority import Authority
from tests.harness import sshd, stub

MAKES = {
    "garbage": "echo 'Welcome!'; cat >/dev/null",
    "a line without end": "tr '\\0' x </dev/zero",
    "depth": "head -c 200000 /dev/zero | tr '\\0' '['; echo; cat >/dev/null",
    "nothing": "sleep 1000",
    "an end": "exit 3",
}
# A Python that does this when it is asked for facts, or only when it is to be the agent.
SCRIPT = """#!/bin/sh
case "$*" in
*"{when}"*) {does};;
*) {real} "$@" | sed -u 's|"path": "{real}"|"path": "'"$0"'"|';;
esac
"""
FACTS, AGENT = "-S -B", " host --cluster "  # what tells these calls from others
LIMITS = {FACTS: ["host.ANSWER_S"], AGENT: ["client.ANSWER_S", "client.UNPACK_S"]}
DEEP = '{"more": ' + "[" * 100_000
Open = Callable[[str, str], Awaitable[Ssh]]


@pytest.fixture
async def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Open]:
    """A host that misbehaves, as a runtime sees it: `when` its Python is called so, and what that `does`."""
    monkeypatch.setattr("mvmci.runtimes.ssh.channel.LINE_BYTES_MAX", 1 << 20)
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(sshd.serve(tmp_path / "sshd"))
        served.authorized_keys.write_text(sshd.make_key(tmp_path / "key"))
        stub.write_zipapp(tmp_path / "mvmci.pyz", here=True)

        async def make(when: str, does: str) -> Ssh:
            if does == "nothing":  # what is honest has the time that it usually has
                for limit in LIMITS[when]:
                    monkeypatch.setattr(f"mvmci.runtimes.ssh.{limit}", 1.0)
            python = tmp_path / "python"
            python.write_text(SCRIPT.format(when=when, does=MAKES[does], real=sys.executable))
            python.chmod(0o755)
            section: HostSection = served.section(
                key=str(tmp_path / "key"),
                host_key=served.host_keys[0],
                python=str(python),
                directory=str(tmp_path / "host"),
            )
            runtime = Ssh(tmp_path / "state", "demo", {"h1": section}, tmp_path / "mvmci.pyz")
            stack.push_async_callback(runtime.close)
            return runtime

        yield make


@pytest.mark.parametrize("does", [one for one in MAKES if one != "an end"])  # of a Python that is none
async def test_facts_that_make_no_sense_are_a_sentence(host: Open, does: str) -> None:
    runtime = await host(FACTS, does)
    with pytest.raises((HostRefused, StoreUnavailable)) as caught:
        await runtime.check()
    assert "h1" in caught.value.message
    assert len(caught.value.message) < 500
    assert not (runtime.root.parent / "host").exists()


@pytest.mark.parametrize("does", MAKES)
async def test_an_agent_that_makes_no_sense_is_a_sentence(host: Open, does: str) -> None:
    runtime = await host(AGENT, does)
    await runtime.check()
    if does == "nothing":
        async with runtime.lock(["h1"], "O1"):
            pass
        assert runtime.away["h1"].startswith("mvmci on h1 does not answer within 2 s")
        return
    with pytest.raises(MvmciError) as caught:
        async with runtime.lock(["h1"], "O1"):
            pytest.fail("nothing was locked")
    assert "h1" in caught.value.message
    assert len(caught.value.message) < 500


class Liar:
    """An agent that says of keys what it likes."""

    def __init__(self, told: list[Key]) -> None:
        self._told = told

    async def ask(self, ask: object, kind: object) -> list[Key]:
        return self._told

    async def tell(self, ask: object) -> None:
        pytest.fail(f"it was given {ask}")


@pytest.mark.parametrize("role", ["broker", "control-plane", "worker"])
@pytest.mark.parametrize("told", [[], ["nonsense"], [DEEP], ["nonsense", "nonsense"]], ids=range(4))
async def test_keys_that_make_no_sense_are_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: RoleName, told: list[str]
) -> None:
    liar = Liar([Key(public=one, there=b"") for one in told])

    async def agent(*_: object) -> Liar:
        return liar

    monkeypatch.setattr(Ssh, "_agent", agent)
    authority = Authority.create(tmp_path / "state" / "demo")
    config = UnitConfig(
        unit=Unit(name=f"{role}-1", role=role, host="h1"),
        dial=("tls://192.0.2.1:4222",),
        broker=BrokerSettings(name="demo") if role == "broker" else None,
    )
    topology = read_topology(
        b"cluster: demo\nworkers: {count: 1}\n", name="demo.yaml", accesses=["per-worker"]
    )
    runtime = Ssh(tmp_path / "state", "demo", {"h1": HostSection()}, tmp_path / "mvmci.pyz")
    with pytest.raises(MvmciError, match="mvmci on h1 said something else than its units' keys"):
        await runtime.provision(
            Provisioning(authority=authority, topology=topology, wanted=[config], starting=[config])
        )
    assert not authority.ledger.planes()
