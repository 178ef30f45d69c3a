"""Keys and certificates, and what is made of them: authorities, tokens, tickets."""

from __future__ import annotations

import shutil
import ssl
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from mvmci.cluster.identity import TICKET_CHARS_MAX, TLS_NAME, Login, Ticket, decode_ticket, encode_ticket
from mvmci.errors import (
    EXIT_REFUSED,
    EXIT_UNREACHABLE,
    StoreUnavailable,
    TicketRefused,
    Usage,
    VersionsDiffer,
)
from mvmci.system import keys
from mvmci.trust import authority as authorities
from mvmci.trust import tokens
from mvmci.trust.authority import Authority, read_credentials, read_identity
from mvmci.trust.enrol.client import read_ticket
from mvmci.trust.permissions import Permissions
from mvmci.trust.signer import CLIENT_S, UNIT_S

NOW = 1_800_000_000.0
FILES = (
    "operator",
    "account",
    "system",
    "ca.key",
    "ca.pem",
    "engine.token",
    "owner",
    "broker.key",
    "broker.pem",
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "demo")


@pytest.fixture
def base(authority: Authority) -> Login:
    return authority.login(["nats://10.0.0.5:4222"], tls=True)


# Keys.


@pytest.mark.parametrize(("kind", "letter"), [("operator", "O"), ("account", "A"), ("user", "U")])
def test_a_key_is_written_as_nats_writes_it(kind: keys.KeyKind, letter: str) -> None:
    seed = keys.new_seed(kind)
    public = keys.public(seed)
    assert seed.startswith(f"S{letter}") and len(seed) == 58
    assert public.startswith(letter) and len(public) == 56
    assert keys.is_public_key(public, kind)
    assert not keys.is_public_key(seed, kind)


def test_only_who_holds_the_seed_can_sign() -> None:
    seed, other = keys.new_seed("user"), keys.new_seed("user")
    signature = keys.sign(seed, b"nonce")
    assert keys.verify(keys.public(seed), b"nonce", signature)
    assert not keys.verify(keys.public(seed), b"other", signature)
    assert not keys.verify(keys.public(other), b"nonce", signature)
    assert not keys.verify("rubbish", b"nonce", signature)
    assert not keys.verify(keys.public(seed), b"nonce", b"short")


def test_a_slip_in_a_key_is_found() -> None:
    seed = keys.new_seed("user")
    for at in range(len(seed)):
        damaged = seed[:at] + ("B" if seed[at] != "B" else "C") + seed[at + 1 :]
        with pytest.raises(keys.BadKey):
            keys.public(damaged)
    for text in ("", "S", "é", seed[:-2], keys.public(seed)):
        with pytest.raises(keys.BadKey):
            keys.public(text)


def test_a_certificate_is_for_any_address_and_for_a_long_time(authority: Authority) -> None:
    context = ssl.create_default_context(cadata=authority.ca)
    assert [one["subject"] for one in context.get_ca_certs()] == [((("commonName", "mvmci demo"),),)]
    told = ssl._ssl._test_decode_cert(str(authority.folder / "broker.pem"))  # type: ignore[attr-defined]
    assert told["subjectAltName"] == (("DNS", TLS_NAME),)
    years = (ssl.cert_time_to_seconds(told["notAfter"]) - ssl.cert_time_to_seconds(told["notBefore"])) / 3e7
    assert years > 15


# The authority of a cluster.


def test_what_an_authority_keeps_is_its_owners_alone(authority: Authority) -> None:
    assert authority.folder.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in authority.folder.iterdir()} == {*FILES}
    assert {path.stat().st_mode & 0o777 for path in authority.folder.iterdir()} == {0o600}


def test_a_ca_of_the_version_before_is_made_one_that_may_have_another_below_it(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key stays: who trusts what there was believes the broker as before."""
    before, (key, narrow) = authority.ca, _narrow_ca()
    (authority.folder / "ca.key").write_text(key)
    (authority.folder / "ca.pem").write_text(narrow)
    (authority.folder / "broker.pem").unlink()
    made = Authority.create(authority.folder.parent)
    assert made.ca not in (before, narrow)
    _check_chain(replace(made, ca=narrow))
    _check_chain(made)
    assert Authority.create(authority.folder.parent).ca == made.ca


def _narrow_ca() -> tuple[str, str]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = keys.new_tls_key()
    key = load_pem_private_key(pem.encode(), None)
    name = keys._common_name("mvmci demo")
    built = keys._certificate(name, name, key.public_key(), time.time(), 10)  # type: ignore[arg-type]
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    built = built.add_extension(keys._usage(key_cert_sign=True, crl_sign=True), critical=True)
    return pem, keys._certificate_pem(built.sign(key, hashes.SHA256()))  # type: ignore[arg-type]


def test_a_secret_is_never_printed(authority: Authority, base: Login) -> None:
    for seed in (authority.operator, authority.account, authority.system):
        assert seed not in repr(authority)


def test_making_an_authority_again_changes_nothing(authority: Authority) -> None:
    before = {path.name: path.read_bytes() for path in authority.folder.iterdir()}
    assert Authority.create(authority.folder.parent) == authority
    assert {path.name: path.read_bytes() for path in authority.folder.iterdir()} == before


@pytest.mark.parametrize("count", range(len(FILES)))
def test_an_authority_whose_making_was_cut_short_is_made_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    written = 0
    write = authorities.write_private

    def write_some(path: Path, data: bytes) -> None:
        nonlocal written
        if written == count:
            raise KeyboardInterrupt
        written += 1
        write(path, data)

    with monkeypatch.context() as cut:
        cut.setattr(authorities, "write_private", write_some)
        with pytest.raises(KeyboardInterrupt):
            Authority.create(tmp_path / "demo")
    seeds = {path.name: path.read_bytes() for path in (tmp_path / "demo" / "keys").glob("[!.]*[!mk]")}
    made = Authority.create(tmp_path / "demo")
    assert {*FILES} == {path.name for path in made.folder.iterdir()}
    assert all((made.folder / name).read_bytes() == data for name, data in seeds.items() if "." not in name)
    _check_chain(made)


def _check_chain(authority: Authority) -> None:
    """The broker's certificate fits its key, and the CA vouches for it."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(authority.folder / "broker.pem", authority.folder / "broker.key")
    client = ssl.create_default_context(cadata=authority.ca)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname=TLS_NAME)
    two = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for side in (one, two):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
    assert one.version() == "TLSv1.3"


@pytest.mark.parametrize("missing", [*FILES[:3], "ca.pem", "all"])
def test_where_the_keys_are_not_it_is_said_so(authority: Authority, missing: str) -> None:
    if missing == "all":
        shutil.rmtree(authority.folder)
    else:
        (authority.folder / missing).unlink()
    with pytest.raises(StoreUnavailable, match="keys of cluster demo are not on this machine") as caught:
        Authority.load(authority.folder.parent)
    assert caught.value.exit_code == EXIT_UNREACHABLE


def test_a_key_that_is_damaged_is_no_key(authority: Authority) -> None:
    (authority.folder / "account").write_text("SA" + "A" * 56)
    with pytest.raises(StoreUnavailable):
        Authority.load(authority.folder.parent)


# Identities of `up`.


def test_an_identity_is_made_once_and_kept(authority: Authority, base: Login, tmp_path: Path) -> None:
    path = tmp_path / "units" / "worker-1" / "identity.json"
    first = authority.identity("worker-1", "worker", ("default",), base, path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert authority.identity("worker-1", "worker", ("default",), base, path) == first == read_identity(path)


@pytest.mark.parametrize("change", ["queues", "role", "urls", "ca", "age", "damaged", "empty"])
def test_an_identity_is_made_again_when_it_fits_no_more_and_keeps_its_key(
    authority: Authority, base: Login, tmp_path: Path, change: str
) -> None:
    path = tmp_path / "identity.json"
    first = authority.identity("u1", "worker", ("default",), base, path)
    role, queues, maker = "worker", ("default",), authority
    if change == "queues":
        queues = ("default", "other")
    elif change == "role":
        role = "client"
    elif change == "urls":
        base = msgspec.structs.replace(base, urls=("nats://10.0.0.6:4222",))
    elif change == "ca":
        base = msgspec.structs.replace(base, ca="")
    elif change == "age":
        maker = replace(authority, now=lambda: authority.now() + UNIT_S * 0.7)
    elif change == "damaged":
        path.write_bytes(path.read_bytes()[:50])
    else:
        path.write_bytes(b"")
    second = maker.identity("u1", role, queues, base, path)  # type: ignore[arg-type]
    assert second != first
    assert (second.login.seed == first.login.seed) == (change not in ("damaged", "empty"))
    assert read_identity(path) == second


def test_another_cluster_of_the_name_does_not_take_over_an_identity(
    authority: Authority, base: Login, tmp_path: Path
) -> None:
    first = authority.identity("u1", "worker", ("default",), base, tmp_path / "identity.json")
    other = Authority.create(tmp_path / "again" / "demo")
    second = other.identity("u1", "worker", ("default",), base, tmp_path / "identity.json")
    assert second.login.seed != first.login.seed


def test_a_login_that_is_lent_is_everybodys(tmp_path: Path) -> None:
    login = Login(urls=("tls://nats.example.com",), jwt="eyJ", seed=keys.new_seed("user"))
    external = Authority.of_external(tmp_path / "demo", login)
    assert Authority.load(tmp_path / "demo").external == login
    assert external.login([], tls=True) == login
    assert external.identity("u1", "worker", ("q",), login, tmp_path / "i.json").login == login
    assert external.admin(login).login == external.ticket("worker", ("q",), login, 60).login == login
    assert external.signer.mint(keys.public(login.seed), "u1", "worker", ("q",), 60) == ""
    assert external.guard() is None
    with pytest.raises(Usage, match="is not mvmci's"):
        external.system_login(login)
    assert Authority.create(tmp_path / "demo").external is None  # `up` with a broker of its own


def test_credentials_are_read_as_nsc_writes_them() -> None:
    seed = keys.new_seed("user")
    text = (
        "-----BEGIN NATS USER JWT-----\neyJ0eXAi.x.y\n------END NATS USER JWT------\n\n"
        "************************* IMPORTANT *************************\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
    assert read_credentials(text, "my.creds") == ("eyJ0eXAi.x.y", seed)
    for broken in ("", text.replace(seed, ""), text.replace("eyJ", ""), text.replace(seed, seed[:-1] + "1")):
        with pytest.raises(Usage, match=r"my\.creds is no \.creds file"):
            read_credentials(broken, "my.creds")


# Tokens.


def test_a_token_is_believed_only_from_who_signed_it(authority: Authority, tmp_path: Path) -> None:
    public = keys.public(keys.new_seed("user"))
    token = authority.signer.mint(public, "u1", "worker", ("default", "gpu"), 60)
    claims = tokens.read_token(token, authority.issuer)
    assert claims is not None
    assert (claims.sub, claims.name, claims.tagged("role"), claims.queues) == (
        public, "u1", "worker", ("default", "gpu"),
    )  # fmt: skip
    other = Authority.create(tmp_path / "other")
    assert tokens.read_token(token, other.issuer) is None
    head, body, signature = token.split(".")
    richer = tokens._b64(tokens._unpadded(body).replace(b"role:worker", b"role:admin"))
    for tampered in (
        f"{head}.{richer}.{signature}",
        f"{head}.{body}.",
        f"{head}.{body}",
        "",
        "é.é.é",
        "a.b.c",
    ):
        assert tokens.read_token(tampered, authority.issuer) is None
    assert tokens.peek(token) == claims
    assert tokens.peek("rubbish") is None


def test_a_token_lives_as_long_as_its_holder_is_likely_to_come_back(
    authority: Authority, base: Login, tmp_path: Path
) -> None:
    for role, life_s in (("worker", UNIT_S), ("executor", UNIT_S), ("client", CLIENT_S)):
        made = authority.identity("u1", role, ("q",), base, tmp_path / f"{role}.json")  # type: ignore[arg-type]
        claims = tokens.peek(made.login.jwt)
        assert claims is not None and life_s <= claims.exp - claims.iat <= life_s + 1
    made = authority.identity("u1", "control-plane", (), base, tmp_path / "control-plane.json")
    claims = tokens.peek(made.login.jwt)
    assert claims is not None and claims.exp == 0, "nobody else could renew it"


def test_a_token_only_lists_what_is_allowed(authority: Authority) -> None:
    token = authority.signer.mint(keys.public(keys.new_seed("user")), "u1", "control-plane", (), 60)
    nats = msgspec.json.decode(tokens._unpadded(token.split(".")[1]))["nats"]
    assert "deny" not in nats["pub"] and "deny" not in nats["sub"]
    assert nats["allowed_connection_types"] == ["STANDARD"]
    assert "resp" not in nats  # it may not answer wherever somebody says
    empty = Permissions(publish=(), subscribe=("x",))
    with pytest.raises(AssertionError, match="would allow everything"):
        tokens.user(authority.account, authority.issuer, "u", empty, NOW, expires_at=1, payload_max=1)


def test_an_accounts_token_takes_keys_away_whatever_the_clocks_say(authority: Authority) -> None:
    gone = keys.public(keys.new_seed("user"))
    token = authority.account_token("main", {gone}, after=authority.now() + 3600)
    claims = tokens.read_token(token, keys.public(authority.operator))
    assert claims is not None and claims.revoked == {gone}
    assert claims.iat > authority.now() + 3600


# Tickets.


def refused(text: str) -> TicketRefused:
    with pytest.raises(TicketRefused) as caught:
        decode_ticket(text)
    assert caught.value.exit_code == EXIT_REFUSED
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value


@pytest.fixture
def ticket(authority: Authority, base: Login) -> Ticket:
    return authority.ticket("worker", ("default",), base, 3600)


def test_a_ticket_is_one_line_that_says_all(ticket: Ticket) -> None:
    text = encode_ticket(ticket)
    assert decode_ticket(text) == decode_ticket(f"  {text}\n") == ticket
    assert "\n" not in text and text.isascii()
    assert len(text) < 2_400 < TICKET_CHARS_MAX


def test_a_ticket_that_was_tampered_with_or_cut_short_is_refused(ticket: Ticket) -> None:
    text = encode_ticket(ticket)
    for at in range(0, len(text), 7):
        refused(text[:at])
        if at < len(text) - 1:  # the last one has bits that are not used
            refused(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])
        if at > 8:
            refused(text[:at] + "A" + text[at:])
    for other in ("", "mvmci1_", "mvmci1_é", f"{text}A", f"{text} {text}", "mvmci1_" + "A" * 100_000):
        refused(other)


@pytest.mark.parametrize("name", ["../other", "/tmp/other", "", ".", "a\x1b[2J"])
def test_a_ticket_whose_cluster_could_not_be_a_folder_of_ours_is_refused(ticket: Ticket, name: str) -> None:
    refused(encode_ticket(msgspec.structs.replace(ticket, cluster=name)))


def test_a_ticket_of_another_version_says_so(ticket: Ticket) -> None:
    with pytest.raises(VersionsDiffer, match="another version") as caught:
        decode_ticket(encode_ticket(ticket).replace("mvmci1_", "mvmci2_"))
    assert caught.value.exit_code == 8


def test_what_is_no_ticket_is_not_repeated(ticket: Ticket) -> None:
    for text in (encode_ticket(ticket)[9:], encode_ticket(ticket)[:-1], ticket.login.seed):
        assert ticket.login.seed not in refused(text).message + str(refused(text).hint)
        assert len(refused(text).message) < 100


def test_a_ticket_is_taken_from_text_a_file_or_standard_input(
    ticket: Ticket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    (tmp_path / "ticket").write_text(f"{encode_ticket(ticket)}\n")
    assert read_ticket(encode_ticket(ticket)) == read_ticket(f"@{tmp_path / 'ticket'}") == ticket
    typed = io.TextIOWrapper(io.BytesIO(f"{encode_ticket(ticket)}\n".encode()))
    monkeypatch.setattr("sys.stdin", typed)
    assert read_ticket("-") == ticket
    monkeypatch.setenv("MVMCI_TICKET_FILE", str(tmp_path / "ticket"))
    assert read_ticket(None) == ticket
    monkeypatch.delenv("MVMCI_TICKET_FILE")
    with pytest.raises(Usage, match="there is no ticket"):
        read_ticket(None)
    with pytest.raises(Usage, match="cannot be read: No such file"):
        read_ticket(f"@{tmp_path / 'none'}")
    (tmp_path / "binary").write_bytes(b"\xff\xff")
    with pytest.raises(Usage, match="it is not text"):
        read_ticket(f"@{tmp_path / 'binary'}")
