"""`mvmci ticket`, `login` and `revoke`, as somebody types them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmci.cluster.broker import LOOPBACK
from mvmci.cluster.identity import Ticket, decode_ticket
from mvmci.deploy.state import ClusterState, Facts
from mvmci.errors import EXIT_REFUSED, EXIT_UNREACHABLE, EXIT_USAGE
from mvmci.store import ClusterSettings
from mvmci.trust.authority import read_identity
from mvmci.trust.enrol.client import enrol
from tests.harness.places import ROOT
from tests.parts.trust.conftest import CLUSTER, EVERYWHERE, World

OUTSIDE = ("nats://10.1.2.3:4222",)


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """What an expected failure says."""
        assert self.out == ""
        first, *hints = self.err.splitlines()
        assert first.startswith("Error: ") and all(hint.startswith("hint: ") for hint in hints), self.err
        return first.removeprefix("Error: ")


async def mvmci(state: Path, *args: object, stdin: str = "", **env: str) -> Outcome:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mvmci", *map(str, args), cwd=ROOT,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": str(state), "MVMCI_STATE": str(state), **env},
    )  # fmt: skip
    out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return Outcome(process.returncode, out.decode(), err.decode())


@pytest.fixture
async def state(world: World) -> Path:
    """The state directory of a machine that brought the cluster up."""
    root = world.folder.parent
    ClusterState(root, CLUSTER).keep_facts(Facts(login=world.base))
    return root


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    return tmp_path / "elsewhere"


async def create(state: Path, *options: object) -> Ticket:
    made = await mvmci(state, "ticket", "create", *options)
    assert made.code == 0, made.err
    return decode_ticket(made.out)


async def test_a_ticket_is_for_a_worker_of_the_clusters_queues_once_within_an_hour(
    world: World, state: Path
) -> None:
    admin = await world.admin()
    await admin.config.put("settings", msgspec.json.encode(ClusterSettings(queues=("default", "slow"))))
    made = await mvmci(state, "ticket", "create")
    assert made.code == 0 and made.out.count("\n") == 1
    ticket = decode_ticket(made.out)
    assert (ticket.role, ticket.queues) == ("worker", ("default", "slow"))
    assert made.err.startswith(f"{ticket.id}: for one machine, as worker, until ")
    assert "only this machine can use the ticket" in made.err
    [row] = (await mvmci(state, "ticket", "ls", "--json")).json
    assert (row["id"], row["uses"], row["used"], row["state"]) == (ticket.id, 1, 0, "open")


async def test_a_ticket_names_where_other_machines_dial(world: World, state: Path) -> None:
    ClusterState(state, CLUSTER).keep_facts(Facts(login=world.base, urls=OUTSIDE))
    made = await mvmci(state, "ticket", "create", "--role", "client")
    assert decode_ticket(made.out).login.urls == OUTSIDE
    assert "only this machine" not in made.err


async def test_a_ticket_in_a_file_is_its_owners_alone(world: World, state: Path, tmp_path: Path) -> None:
    file = tmp_path / "a" / "ticket"
    made = await mvmci(state, "ticket", "create", "--queue", "gpu", "--uses", 3, "--output", file, "--json")
    assert file.stat().st_mode & 0o777 == 0o600
    ticket = decode_ticket(file.read_text())
    assert made.json["file"] == str(file) and "ticket" not in made.json
    assert (made.json["id"], made.json["queues"], made.json["uses"]) == (ticket.id, ["gpu"], 3)
    assert ticket.login.seed not in made.out + made.err
    refused = await mvmci(state, "ticket", "create", "--output", "/proc/none/ticket")
    assert refused.code == EXIT_USAGE and "/proc/none/ticket cannot be written" in refused.sentence


async def test_tickets_are_listed_with_what_became_of_them_and_without_their_secrets(
    world: World, state: Path, tmp_path: Path
) -> None:
    await world.control_plane()
    assert (await mvmci(state, "ticket", "ls")).err == "no tickets\n"
    used, revoked = await create(state, "--queue", "default"), await create(state, "--role", "client")
    expired = await create(state, "--ttl", "1ms")
    await enrol(used, tmp_path / "identity.json")
    assert (await mvmci(state, "ticket", "revoke", revoked.id)).code == 0
    assert (await mvmci(state, "ticket", "revoke", revoked.id)).code == 0  # again is free
    listed = await mvmci(state, "ticket", "ls", "--json")
    rows = {row["id"]: row for row in listed.json}
    assert {row: one["state"] for row, one in rows.items()} == {
        used.id: "used", revoked.id: "revoked", expired.id: "expired",
    }  # fmt: skip
    assert rows[used.id].keys() == {
        "id", "role", "queues", "uses", "used", "created_at", "expires_at", "revoked_at", "state",
    }  # fmt: skip
    shown = await mvmci(state, "ticket", "ls")
    assert shown.out.splitlines()[0].split() == ["ID", "ROLE", "QUEUES", "USED", "EXPIRES", "STATE"]
    for ticket in (used, revoked, expired):
        assert ticket.id in shown.out
        for secret in (ticket.login.seed, ticket.login.jwt):
            assert secret not in listed.out + shown.out


async def test_a_ticket_is_looked_at_without_a_cluster_and_without_its_secrets(
    world: World, state: Path, elsewhere: Path, tmp_path: Path
) -> None:
    made = await mvmci(state, "ticket", "create", "--queue", "default")
    ticket = decode_ticket(made.out)
    (tmp_path / "ticket").write_text(made.out)
    for looked in (
        await mvmci(elsewhere, "ticket", "inspect", made.out.strip(), "--json"),
        await mvmci(elsewhere, "ticket", "inspect", f"@{tmp_path / 'ticket'}", "--json"),
        await mvmci(elsewhere, "ticket", "inspect", "-", "--json", stdin=made.out),
        await mvmci(elsewhere, "ticket", "inspect", "--json", MVMCI_TICKET_FILE=str(tmp_path / "ticket")),
    ):
        assert looked.code == 0, looked.err
        assert (looked.json["id"], looked.json["cluster"]) == (ticket.id, CLUSTER)
        assert looked.json.keys() == {
            "id", "cluster", "role", "queues", "expires_at", "urls", "ca_sha256",
        }  # fmt: skip
    told = await mvmci(elsewhere, "ticket", "inspect", made.out.strip())
    assert "queues      default\n" in told.out
    assert ticket.login.seed not in told.out and ticket.login.jwt not in told.out
    assert not elsewhere.exists()
    for text in ("rubbish", made.out.strip()[:-3], made.out.strip()[:-3] + "AAA"):
        damaged = await mvmci(elsewhere, "ticket", "inspect", text)
        assert damaged.code == EXIT_REFUSED
        assert len(damaged.sentence) < 100
    missing = await mvmci(elsewhere, "ticket", "inspect", "@none")
    assert missing.code == EXIT_USAGE and "none cannot be read" in missing.sentence


@pytest.mark.parametrize("listen", [LOOPBACK, EVERYWHERE], ids=["plain", "tls"])
async def test_a_laptop_logs_in_and_is_cut_off_again(world: World, state: Path, elsewhere: Path) -> None:
    await world.control_plane()
    made = await mvmci(state, "ticket", "create", "--role", "client")
    logged = await mvmci(elsewhere, "login", "-", "--name", "laptop", stdin=made.out)
    assert (logged.code, logged.out) == (0, "")
    assert logged.err == "this machine is laptop, a client of demo\n"
    path = elsewhere / CLUSTER / "client.json"
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    identity = read_identity(path)
    assert identity is not None and (identity.role, identity.unit) == ("client", "laptop")
    assert (await mvmci(elsewhere, "list", "--json")).json == []
    revoked = await mvmci(state, "revoke", "laptop")
    assert (revoked.code, revoked.err) == (0, "laptop is revoked\n")
    cut = await mvmci(elsewhere, "list")
    assert cut.code == EXIT_REFUSED and "refuses the credential" in cut.sentence
    again = await mvmci(elsewhere, "login", made.out.strip(), "--name", "laptop")
    assert again.code == EXIT_REFUSED and "refuses the credential" in again.sentence


async def test_a_ticket_of_another_role_logs_nobody_in(world: World, state: Path, elsewhere: Path) -> None:
    ticket = (await mvmci(state, "ticket", "create", "--queue", "default")).out.strip()
    refused = await mvmci(elsewhere, "login", ticket)
    assert refused.code == EXIT_REFUSED
    assert refused.sentence == "this ticket is for a worker, not for a client"
    assert not elsewhere.exists()


@pytest.mark.parametrize(
    "verb", [("ticket", "create"), ("ticket", "ls"), ("ticket", "revoke", "x"), ("revoke", "worker-1")]
)
async def test_where_the_clusters_keys_are_not_the_verbs_say_so(
    world: World, state: Path, elsewhere: Path, verb: tuple[str, ...]
) -> None:
    await world.control_plane()
    unknown = await mvmci(elsewhere, *verb)
    assert unknown.code == EXIT_UNREACHABLE and unknown.sentence == "no cluster is known here"
    ticket = (await mvmci(state, "ticket", "create", "--role", "client")).out.strip()
    assert (await mvmci(elsewhere, "login", ticket)).code == 0
    away = await mvmci(elsewhere, *verb)
    assert away.code == EXIT_UNREACHABLE
    assert away.sentence.startswith("the keys of cluster demo are not on this machine")


async def test_what_is_not_there_cannot_be_revoked(world: World, state: Path) -> None:
    for verb, name, said in (
        (("revoke",), "x", "there is no unit or host x with a credential"),
        (("revoke",), "../x", "there is no unit or host ../x with a credential"),
        (("ticket", "revoke"), "x", "there is no ticket x"),
    ):
        refused = await mvmci(state, *verb, name)
        assert (refused.code, refused.sentence) == (EXIT_USAGE, said)
    odd = await mvmci(state, "ticket", "revoke", "../x")
    assert odd.code == EXIT_USAGE and "cannot be a" in odd.sentence


async def test_bad_options_of_a_ticket_are_refused_before_anything_is_made(world: World, state: Path) -> None:
    for options in (
        ("--role", "admin"), ("--uses", "0"), ("--ttl", "never"), ("--ttl", "0"), ("--queue", "Not One"),
    ):  # fmt: skip
        assert (await mvmci(state, "ticket", "create", *options)).code == EXIT_USAGE
    assert (await mvmci(state, "ticket", "ls", "--json")).json == []
