"""What units are given: what they need and no more, tickets for ever, and what was revoked stays so."""

from __future__ import annotations

import dataclasses
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.deployment import RoleName, Unit, UnitConfig
from mvmci.cluster.identity import TLS_NAME, Login, decode_ticket
from mvmci.errors import Usage
from mvmci.system import keys
from mvmci.trust import provision, tokens
from mvmci.trust.accounts import Account
from mvmci.trust.authority import Authority, read_identity
from mvmci.trust.ledger import Plane
from mvmci.trust.provision import (
    BrokerConfig,
    ControlPlaneConfig,
    MemberConfig,
    make_config,
    ticket_for,
    trust_of,
)
from mvmci.trust.registry import TicketRecord

INSIDE = Login(urls=("tls://broker:4222",), ca="CA")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "demo")


def test_a_ticket_is_for_any_number_of_uses_and_for_ever(authority: Authority) -> None:
    text, record = ticket_for(authority, "worker", ["default"], INSIDE, "")
    ticket = decode_ticket(text)
    claims = tokens.read_token(ticket.login.jwt, authority.issuer)
    assert claims is not None
    assert (ticket.expires_at, claims.exp, record.expires_at, record.uses) == (0, 0, 0, 0)
    assert (record.role, record.queues, record.key) == ("worker", ("default",), claims.sub)


def test_a_ticket_that_fits_stays(authority: Authority) -> None:
    text, record = ticket_for(authority, "worker", ["default"], INSIDE, "")
    assert ticket_for(authority, "worker", ["default"], INSIDE, text) == (text, record)


@pytest.mark.parametrize(
    "change",
    [
        {"queues": ["default", "gpu"]},
        {"role": "executor"},
        {"login": Login(urls=("tls://elsewhere:4222",), ca="CA")},
        {"login": Login(urls=INSIDE.urls, ca="another")},
    ],
)
def test_one_that_does_not_is_replaced(change: dict[str, Any], authority: Authority) -> None:
    same: dict[str, Any] = {"role": "worker", "queues": ["default"], "login": INSIDE}
    text, _ = ticket_for(authority, **same, there="")
    assert ticket_for(authority, **(same | change), there=text)[0] != text


@pytest.mark.parametrize("there", ["", "nonsense", "mvmci1_AAAA"])
def test_nonsense_is_replaced(there: str, authority: Authority) -> None:
    assert decode_ticket(ticket_for(authority, "worker", ["default"], INSIDE, there)[0]).cluster == "demo"


def test_a_ticket_of_other_keys_is_replaced(authority: Authority, tmp_path: Path) -> None:
    """A cluster that was purged and made again has other keys, and an old folder may lie about."""
    text, _ = ticket_for(Authority.create(tmp_path / "other" / "demo"), "worker", ["default"], INSIDE, "")
    assert ticket_for(authority, "worker", ["default"], INSIDE, text)[0] != text


def config(role: RoleName, **more: Any) -> UnitConfig:
    unit = Unit(name=f"{role}-1", role=role, host="local", options=("--queue=default",))
    told = {"dial": INSIDE.urls} | more
    return UnitConfig(unit=unit, **told)


BROKER = config("broker", dial=(), broker=BrokerSettings(name="demo"))
KEYS = Path("/run/secrets")
DEEP = '{"more": ' + "[" * 100_000


def made(authority: Authority, config: UnitConfig, there: bytes = b"") -> bytes:
    data = make_config(config, authority, there, keys_in=KEYS)
    assert data is not None
    return data


def test_a_broker_gets_no_seed(authority: Authority) -> None:
    text = made(authority, BROKER).decode()
    assert not [seed for seed in (authority.operator, authority.account, authority.system) if seed in text]
    told = msgspec.json.decode(text, type=BrokerConfig)
    assert told.guard(Path()).key == Path("/run/secrets/broker.key")
    assert authority.issuer in told.accounts


def test_a_worker_gets_its_own_key_and_no_other(authority: Authority) -> None:
    text = made(authority, config("worker")).decode()
    assert not [seed for seed in (authority.operator, authority.account, authority.system) if seed in text]
    identity = msgspec.json.decode(text, type=MemberConfig).identity
    assert (identity.unit, identity.role, identity.queues) == ("worker-1", "worker", ("default",))
    assert (identity.login.urls, identity.login.ca) == (INSIDE.urls, authority.ca)


def test_a_balancer_gets_nothing(authority: Authority) -> None:
    assert make_config(config("balancer"), authority, b"", keys_in=KEYS) is None


def test_a_control_plane_gets_no_key_of_the_cluster(authority: Authority, tmp_path: Path) -> None:
    text = made(authority, config("control-plane")).decode()
    assert not [seed for seed in (authority.operator, authority.account, authority.system) if seed in text]
    plane = msgspec.json.decode(text, type=ControlPlaneConfig)
    identity = plane.identity(tmp_path / "identity.json")
    assert identity == plane.identity(tmp_path / "identity.json")
    assert identity.login.seed == plane.seed
    assert tokens.read_token(identity.login.jwt, authority.issuer) is not None
    signer = plane.signer()
    assert signer.seed not in (authority.account, plane.seed)
    assert signer.accounts == authority.accounts
    assert keys.public(signer.seed) in authority.ledger.signers()


def test_accounts_believe_a_control_plane_for_who_enrols_and_for_nobody_else(authority: Authority) -> None:
    plane = msgspec.json.decode(made(authority, config("control-plane")), type=ControlPlaneConfig)
    signer = keys.public(plane.signer().seed)
    told = {name: tokens.peek(token) for name, token in plane.accounts.items()}
    assert {name for name, one in told.items() if one and signer in one.signers} == {
        "workers", "executors", "clients",
    }  # fmt: skip
    assert not plane.signer().signs_for("control-plane")
    authority.ledger.revoke("signers", signer)
    after = tokens.peek(authority.account_token("workers"))
    assert after is not None and after.signers == {authority.issuer}


def test_a_control_plane_starts_on_a_file_of_the_version_before(authority: Authority, tmp_path: Path) -> None:
    """An upgrade begins with such a file, which is still there when it is broken off."""
    file = tmp_path / "config.json"
    before = {
        "cluster": "demo",
        "unit": "control-plane-1",
        "seed": keys.new_seed("user"),
        "login": {"urls": ["nats://127.0.0.1:1"]},
        "operator": authority.operator,
        "account": authority.account,
        "system": authority.system,
    }
    file.write_bytes(msgspec.json.encode(before))
    plane = provision.read_config(file, ControlPlaneConfig)
    identity = plane.identity(tmp_path / "identity.json")
    assert tokens.read_token(identity.login.jwt, authority.issuer) is not None
    assert plane.signer().accounts == authority.accounts
    assert plane.signer().signs_for("control-plane")
    assert plane.trusted().operator == keys.public(authority.operator)
    after = msgspec.json.decode(
        made(authority, config("control-plane"), file.read_bytes()), type=dict[str, Any]
    )
    assert after["seed"] == before["seed"], "its key stays"
    assert not {"operator", "account", "system"} & after.keys()


def test_what_a_line_was_cut_short_in_is_not_in_the_ledger(authority: Authority) -> None:
    ledger, first, second = authority.ledger, plane(), plane()
    one, cut, other = user(), user(), user()
    ledger.add_plane("control-plane-1", first)
    ledger.revoke("workers", one)
    with (authority.folder / "ledger").open("ab") as file:
        file.write(f"\nrevoked workers {cut}".encode())
    ledger.revoke("workers", other, one)
    ledger.add_plane("control-plane-1", second)
    assert ledger.revoked("workers") == {one, other}
    assert ledger.planes() == {"control-plane-1": second}
    assert ledger.signers() == {second.signer}
    assert (authority.folder / "ledger").stat().st_mode & 0o777 == 0o600
    assert (authority.folder / "ledger").read_text().count(one) == 1


def user() -> str:
    """The public key of somebody."""
    return keys.public(keys.new_seed("user"))


def plane() -> Plane:
    """The public keys of a control plane."""
    return Plane(user(), keys.public(keys.new_seed("account")))


def test_what_a_host_gives_out_as_keys_adds_no_line_to_the_ledger(authority: Authority) -> None:
    """Whoever is root there would have somebody sign who is not named when that control plane is revoked."""
    own, ghost = plane(), plane()
    line = f" .\nplane ghost {ghost.key} {ghost.signer}"
    tls = keys.public_tls_key(keys.new_tls_key())
    told = (
        {"key": own.key, "signer": own.signer + line, "tls": tls},
        {"key": own.key + line, "signer": own.signer, "tls": tls},
        {"key": own.signer, "signer": own.key, "tls": tls},
        {"key": "", "signer": "", "tls": tls},
        [[]],
    )
    for lie in (*(msgspec.json.encode(one).decode() for one in told), DEEP):
        with pytest.raises(keys.BadKey):
            make_config(config("control-plane"), authority, b"", keys_in=KEYS, public=lie)
    assert authority.ledger.planes() == {}
    public = msgspec.json.encode({"key": own.key, "signer": own.signer, "tls": tls}).decode()
    assert make_config(config("control-plane"), authority, b"", keys_in=KEYS, public=public)
    assert authority.ledger.planes() == {"control-plane-1": own}


@pytest.mark.parametrize("role", ["worker", "executor"])
def test_a_unit_gets_a_token_for_a_key_of_its_kind_alone(role: RoleName, authority: Authority) -> None:
    for lie in ("nonsense", keys.public(keys.new_seed("account"))):
        with pytest.raises(keys.BadKey):
            make_config(config(role), authority, b"", keys_in=KEYS, public=lie)


@pytest.mark.parametrize("there", [DEEP.encode(), b'{"cluster": "\xff"}', b"nonsense"], ids=range(3))
@pytest.mark.parametrize("role", ["worker", "control-plane"])
def test_a_file_that_makes_no_sense_is_made_anew(role: RoleName, there: bytes, authority: Authority) -> None:
    """A host over ssh says what it has."""
    assert b"demo" in made(authority, config(role), there)


@pytest.mark.parametrize("role", ["broker", "control-plane", "worker", "executor"])
@pytest.mark.parametrize("there", [b"nonsense", b"{}"])
def test_the_same_again_is_the_same_file_and_nonsense_is_replaced(
    role: RoleName, there: bytes, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = BROKER if role == "broker" else config(role)
    first = made(authority, wanted, there)
    later = dataclasses.replace(authority, now=lambda: time.time() + 1000)  # tokens are minted anew
    assert made(later, wanted, first) == first


def test_a_broker_that_is_to_be_another_gets_another_file(authority: Authority) -> None:
    other = msgspec.structs.replace(BROKER, broker=BrokerSettings(name="demo", synced=False))
    assert made(authority, other, made(authority, BROKER)) != made(authority, BROKER)


@pytest.mark.parametrize(("role", "kind"), [("worker", MemberConfig), ("control-plane", ControlPlaneConfig)])
def test_a_unit_keeps_its_key_over_all_changes_but_that_of_its_generation(
    role: RoleName, kind: Any, authority: Authority
) -> None:
    def seed(data: bytes) -> str:
        found = msgspec.json.decode(data, type=kind)
        return str(found.seed if kind is ControlPlaneConfig else found.identity.login.seed)

    first = made(authority, config(role))
    moved = made(authority, config(role, dial=("tls://elsewhere:1",)), first)
    assert seed(moved) == seed(first)
    assert moved != first
    after = made(authority, config(role, generation=1), first)
    assert seed(after) != seed(first)
    assert made(authority, config(role, generation=1), after) == after


def test_a_token_that_a_unit_renewed_is_kept_and_one_that_it_is_given_later_is_taken(
    authority: Authority, tmp_path: Path
) -> None:
    def given(at_s: float, **more: Any) -> MemberConfig:
        later = dataclasses.replace(authority, now=lambda: time.time() + at_s)
        return msgspec.json.decode(made(later, config("worker", **more), data), type=MemberConfig)

    data = b""
    path = tmp_path / "identity.json"
    data = made(authority, config("worker"))
    first = msgspec.json.decode(data, type=MemberConfig)
    assert first.settled(path) == first.identity == read_identity(path)
    renewed = given(25 * 24 * 3600)  # two thirds of its life are over
    assert renewed.identity != first.identity
    assert renewed.settled(path) == renewed.identity
    assert first.settled(path) == renewed.identity, "it has a newer one"
    other = given(0, generation=1)
    assert other.settled(path) == other.identity, "its key is another"


HOST = {"names": ("box",), "addresses": ("192.0.2.7", "2001:db8::7")}


def given(authority: Authority, config: UnitConfig, key: str, there: bytes = b"") -> bytes:
    """The file of a unit whose key lies elsewhere."""
    public = provision.public_of(config.unit.role, key)
    data = make_config(config, authority, there, keys_in=KEYS, public=public, **HOST)
    assert data is not None
    return data


@pytest.mark.parametrize("role", ["broker", "control-plane", "worker", "executor"])
def test_a_key_that_was_made_elsewhere_stays_there(role: RoleName, authority: Authority) -> None:
    wanted = BROKER if role == "broker" else config(role)
    key = provision.new_key(role)
    data = given(authority, wanted, key)
    secret = key.splitlines()[1] if role == "broker" else key
    assert secret not in data.decode()
    assert secret not in provision.public_of(role, key)
    assert given(authority, wanted, key, data) == data, "the same again is the same file"
    assert given(authority, wanted, provision.new_key(role), data) != data
    whole = provision.with_seed(data, key)
    kinds: dict[str, Any] = {"broker": BrokerConfig, "control-plane": ControlPlaneConfig}
    found = msgspec.json.decode(whole, type=kinds.get(role, MemberConfig))
    held = found.identity.login.seed if isinstance(found, MemberConfig) else found.seed
    assert held == key


@pytest.mark.parametrize(
    ("role", "accounts"),
    [
        ("control-plane", {"main", "signers"}),
        ("worker", {"workers", "executors"}),
        ("executor", {"workers", "executors"}),
        ("broker", set()),
        ("balancer", set()),
    ],
)
def test_what_was_said_of_a_key_is_enough_to_revoke_it(
    role: RoleName, accounts: set[str], authority: Authority
) -> None:
    key, other = provision.new_key(role), provision.new_key(role)
    provision.revoke_public(authority, provision.public_of(role, key))
    revoked = {account: authority.ledger.revoked(account) for account in ("signers", *get_args(Account))}
    wanted = {account: {keys.public(key)} for account in accounts}
    if role == "control-plane":
        wanted["signers"] = {keys.public(provision.signing_seed(key))}
    assert {account: found for account, found in revoked.items() if found} == wanted
    provision.revoke_public(authority, provision.public_of(role, other))
    assert all(keys < authority.ledger.revoked(account) for account, keys in wanted.items())


def test_a_unit_whose_key_was_made_elsewhere_is_who_it_would_be_else(
    authority: Authority, tmp_path: Path
) -> None:
    key = provision.new_key("worker")
    data = provision.with_seed(given(authority, config("worker"), key), key)
    identity = msgspec.json.decode(data, type=MemberConfig).settled(tmp_path / "identity.json")
    claims = tokens.read_token(identity.login.jwt, authority.issuer)
    assert claims is not None
    assert (claims.sub, claims.name, claims.queues) == (keys.public(key), "worker-1", ("default",))
    key = provision.new_key("control-plane")
    data = provision.with_seed(given(authority, config("control-plane"), key), key)
    plane = msgspec.json.decode(data, type=ControlPlaneConfig)
    assert plane.identity(tmp_path / "plane.json").login.seed == key


def test_a_broker_elsewhere_gets_a_certificate_for_its_host(authority: Authority, tmp_path: Path) -> None:
    key = provision.new_key("broker")
    data = provision.with_seed(given(authority, BROKER, key), key)
    guard = msgspec.json.decode(data, type=BrokerConfig).guard(tmp_path)
    for path, text in guard.files.items():
        Path(path).write_text(text)
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(guard.certificate, guard.key)  # type: ignore[arg-type]
    told = ssl._ssl._test_decode_cert(str(guard.certificate))  # type: ignore[attr-defined]
    assert told["subjectAltName"] == (
        ("DNS", TLS_NAME),
        ("DNS", "box"),
        ("IP Address", "192.0.2.7"),
        ("IP Address", "2001:DB8:0:0:0:0:0:7"),
    )
    moved = make_config(BROKER, authority, data, keys_in=KEYS, public=provision.public_of("broker", key))
    assert moved is not None
    assert msgspec.json.decode(moved, type=BrokerConfig).tls not in ("", guard.files[str(guard.certificate)])


def test_the_login_to_a_broker_of_the_users_own_is_not_given_another_key(tmp_path: Path) -> None:
    lent = Login(urls=("nats://x:1",), jwt="eyJ.a.b", seed=keys.new_seed("user"))
    external = Authority.of_external(tmp_path / "lent", lent)
    key = provision.new_key("worker")
    data = given(external, config("worker", dial=lent.urls), key)
    assert msgspec.json.decode(provision.with_seed(data, key), type=MemberConfig).identity.login == lent


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff"])
def test_what_is_no_file_of_a_unit_gets_no_key(data: bytes) -> None:
    with pytest.raises(Usage, match="no file of a unit"):
        provision.with_seed(data, "key")


@pytest.mark.parametrize(
    "text", ["", "nonsense", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]
)
def test_only_a_key_gets_a_certificate(text: str, authority: Authority) -> None:
    with pytest.raises(keys.BadKey):
        authority.sign_certificate(text)


def test_whom_units_believe_is_told_apart_and_tells_nothing(authority: Authority, tmp_path: Path) -> None:
    login = Login(urls=("tls://x:1",), jwt="eyJ.a.b", seed=keys.new_seed("user"))
    found = [
        trust_of(authority),
        trust_of(Authority.create(tmp_path / "other" / "demo")),
        trust_of(login),
        trust_of(msgspec.structs.replace(login, seed=keys.new_seed("user"))),
        trust_of(Login(urls=("tls://x:1",))),
    ]
    assert len(set(found)) == len(found)
    assert trust_of(Authority.load(tmp_path / "demo")) == trust_of(authority)


def test_whose_a_cluster_is_stays_the_same_when_its_login_to_a_broker_changes(tmp_path: Path) -> None:
    """Else each of its hosts would take it for another one of that name."""
    login = Login(urls=("tls://x:1",), jwt="eyJ.a.b", seed=keys.new_seed("user"))
    other = msgspec.structs.replace(login, jwt="eyJ.c.d")
    mine = Authority.of_external(tmp_path / "demo", login).owner
    assert Authority.of_external(tmp_path / "demo", other).owner == mine
    assert Authority.load(tmp_path / "demo").owner == mine
    assert Authority.of_external(tmp_path / "another" / "demo", login).owner != mine
    assert mine not in Authority.load(tmp_path / "demo").token


@pytest.mark.parametrize("external", [None, Login(urls=("tls://x:1",))])
def test_so_it_does_when_executors_ask_for_another_token(tmp_path: Path, external: Login | None) -> None:
    """As they are to where somebody had one of the hosts: `revoke` does not take that away."""

    def made() -> Authority:
        folder = tmp_path / "demo"
        return Authority.create(folder) if external is None else Authority.of_external(folder, external)

    token, mine = made().token, made().owner
    (tmp_path / "demo/keys/engine.token").unlink()
    assert Authority.load(tmp_path / "demo").owner == mine
    assert made().token != token
    assert made().owner == mine


def test_what_stands_in_the_registry_stays() -> None:
    """It says who used a ticket, and whether it was revoked."""
    made = TicketRecord(role="worker", uses=0)
    assert provision._first(made, None) == made
    assert provision._first(made, msgspec.structs.replace(made, revoked=1)) is None


@pytest.mark.parametrize("kind", [BrokerConfig, ControlPlaneConfig, MemberConfig])
@pytest.mark.parametrize("data", [None, b"", b"{}", b"\xff"])
def test_a_file_that_is_not_what_was_rendered_is_refused(
    kind: Callable[..., Any], data: bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / "broker.json"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(Usage, match="cannot be read"):
        provision.read_config(file, kind)
