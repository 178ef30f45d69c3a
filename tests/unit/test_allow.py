"""The allow-list: what a rule lets through, and what no rule does."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvmci.jobs.allow import Allow, BadRule, BadUrl, is_public_address, parse


@pytest.mark.parametrize(
    ("rule", "url", "allowed"),
    [
        ("*", "https://anything.example/x?y=z", True),
        ("*", "http://anything.example:8080", True),
        ("*", "ftp://anything.example/", False),
        ("https://api.example.com/*", "https://api.example.com", True),
        ("https://api.example.com/*", "https://API.Example.COM:443/v1?q=1", True),
        ("https://api.example.com/*", "HTTPS://api.example.com./v1", True),
        ("https://api.example.com/*", "http://api.example.com/v1", False),
        ("https://api.example.com/*", "https://api.example.com:8443/v1", False),
        ("https://api.example.com:8443/*", "https://api.example.com:8443/v1", True),
        ("https://api.example.com:*/*", "https://api.example.com:8443/v1", True),
        ("*://api.example.com/*", "http://api.example.com/v1", True),
        ("https://*.example.com/*", "https://a.b.example.com/", True),
        ("https://*.example.com/*", "https://example.com/", False),
        ("https://*.example.com/*", "https://evil.com/?.example.com/", False),
        ("https://*.example.com/*", "https://evil.com/.example.com/", False),
        ("https://*.example.com/*", "https://evil.com#.example.com/", False),
        ("https://*/v1/*", "https://evil.com/?/v1/", False),
        ("https://h.example/a", "https://h.example/a", True),
        ("https://h.example/a", "https://h.example/a?x=1", False),
        ("https://h.example/a*", "https://h.example/a?x=1", True),
        ("https://h.example", "https://h.example/", True),
        ("https://h.example", "https://h.example/a", False),
        ("https://h.example/public/*", "https://h.example/public/../secret", False),
        ("https://h.example/public/*", "https://h.example/public/%2e%2E/secret", False),
        ("https://h.example/public/*", "https://h.example/public/./x/../y", True),
        ("https://h.example/public/*", "https://h.example/%70ublic/x", True),
        ("https://h.example/a/*/c", "https://h.example/a/b/b/c", True),
        ("https://h.example/a/*/c", "https://h.example/a/c", False),
        ("http://[::1]:80/*", "http://[0:0::1]/", True),
        ("http://127.0.0.1/*", "http://[::ffff:127.0.0.1]/", True),
    ],
)
def test_a_star_never_leaves_its_component(rule: str, url: str, allowed: bool) -> None:
    assert Allow(http=(rule,)).decide(url).allowed is allowed


@pytest.mark.parametrize(
    "url",
    [
        "https://user@api.example.com/",
        "https://user:password@api.example.com/",
        "https://api.example.com\\@evil.com/",
        "https://api.example.com/\r\nHost: evil",
        "https://api.example.com/a b",
        "https://api.example.com/\u00a0",
        "https://api.example.com/\x7f",
        "https://api.example.com/\ud800",
        " https://api.example.com/",
        "https:/api.example.com/",
        "//api.example.com/",
        "https://",
        "https:///x",
        "https://api..example.com/",
        "https://bücher.example/",
        "https://api%2eexample.com/",
        "https://api.example.com:0/",
        "https://api.example.com:65536/",
        "https://api.example.com:\uff18\uff10/",
        "https://*/",
        "https://0x7f.1/",
        "https://0x7f000001/",
        "https://2130706433/",
        "https://017700000001/",
        "https://127.1/",
        "https://127.0.0.01/",
        "https://127.0.0.0x1/",
        "https://[::1%25eth0]/",
        "https://[::1]evil.com/",
        "https://[::1/",
        "https://api.example.com/%",
        "https://api.example.com/%zz",
        "https://api.example.com/a/..%2fb",
        "https://api.example.com/a/..%5Cb",
        "https://api.example.com/a/..;x/b",
        "https://api.example.com/" + "a" * 9000,
        "javascript:alert(1)",
        "file:///etc/passwd",
    ],
)
def test_a_url_that_could_be_read_in_two_ways_is_refused_under_every_rule(url: str) -> None:
    with pytest.raises(BadUrl):
        parse(url)
    assert not Allow(http=("*",)).decide(url).allowed


@pytest.mark.parametrize(
    ("url", "form"),
    [
        ("HTTPS://A.Example:443", "https://a.example/"),
        ("http://a.example:8080/?", "http://a.example:8080/"),
        ("http://a.example/%7euser/%2f%3f?a=%20#b", "http://a.example/~user/%2F%3F?a=%20"),
        ("http://a.example/é|", "http://a.example/%C3%A9%7C"),
        ("http://a.example/../../b/.", "http://a.example/b/"),
        ("http://a.example/b/..", "http://a.example/"),
        ("http://a.example//b//c", "http://a.example//b//c"),
        ("http://[2001:DB8:0:0::1]:80/", "http://[2001:db8::1]/"),
    ],
)
def test_a_url_has_one_form(url: str, form: str) -> None:
    assert str(parse(url)) == form
    assert str(parse(form)) == form


@given(st.text(alphabet="abz/.%25eF;?&=~é*", max_size=40))
def test_the_form_of_a_url_is_its_own_form(tail: str) -> None:
    try:
        form = str(parse(f"http://a.example/{tail}"))
    except BadUrl:
        return
    assert str(parse(form)) == form
    assert "/../" not in form.partition("?")[0]


@pytest.mark.parametrize(
    "rule",
    [
        "api.example.com",
        "ftp://a.example/*",
        "https://example.com*",
        "https://example.c*",
        "https://10.0.0.*/",
        "https://user@a.example/",
        "https://a.example/ b",
        "https://a.example:99999/",
        "https://0177.0.0.1/",
        "",
    ],
)
def test_a_rule_that_means_nothing_is_refused(rule: str) -> None:
    with pytest.raises(BadRule):
        Allow(http=(rule,))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"http": [rule]}, Allow)


def test_what_is_denied_names_the_line_to_add_and_the_line_works() -> None:
    decision = Allow().decide("https://api.example.com:8443/v1/secret?token=1")
    assert 'allow: {http: ["https://api.example.com:8443/*"]}' in decision.hint
    assert "token" not in decision.hint
    assert Allow(http=("https://api.example.com:8443/*",)).decide("https://api.example.com:8443/v1").allowed


@pytest.mark.parametrize(
    ("rule", "url", "address", "opened"),
    [
        ("*", "http://127.0.0.1/", "127.0.0.1", False),
        ("http://*/*", "http://localhost/", "127.0.0.1", False),
        ("http://*.corp.example/*", "http://git.corp.example/", "10.1.2.3", False),
        ("http://git.corp.example/*", "http://git.corp.example/", "10.1.2.3", True),
        ("http://git.corp.example:*/*", "http://git.corp.example:81/", "100.64.0.1", True),
        ("http://git/*", "http://git/", "fd00::1", True),
        ("http://git/*", "http://git/", "127.0.1.1", True),
        ("http://git/*", "http://git/", "::1", True),
        ("http://git/*", "http://git/", "169.254.169.254", False),
        ("http://git/*", "http://git/", "::ffff:169.254.169.254", False),
        ("http://git/*", "http://git/", "fe80::1%eth0", False),
        ("http://git/*", "http://git/", "64:ff9b::a9fe:a9fe", False),
        ("http://git/*", "http://git/", "2002:a9fe:a9fe::", False),
        ("http://git/*", "http://git/", "fd00:ec2::254", False),
        ("http://git/*", "http://git/", "100.100.100.200", False),
        ("http://git/*", "http://git/", "168.63.129.16", False),
        ("http://git/*", "http://git/", "0.0.0.0", False),
        ("http://git/*", "http://git/", "224.0.0.1", False),
        ("http://169.254.169.254/*", "http://169.254.169.254/", "169.254.169.254", True),
        ("http://168.63.129.16/*", "http://168.63.129.16/", "168.63.129.16", True),
        ("http://localhost:*/*", "http://localhost:9000/", "127.0.0.1", True),
        ("http://127.0.0.1:9000/*", "http://127.0.0.1:9000/", "127.0.0.1", True),
        ("http://[fd00::1]/*", "http://[fd00::1]/", "fd00::1", True),
        ("https://8.8.8.8/*", "https://8.8.8.8/", "10.0.0.1", False),
    ],
)
def test_only_a_rule_that_names_the_host_opens_what_is_not_public(
    rule: str, url: str, address: str, opened: bool
) -> None:
    decision = Allow(http=(rule,)).decide(url)
    assert decision.allowed
    assert decision.permits(address) is opened


def test_a_private_rule_opens_the_address_it_names_and_no_other() -> None:
    named = Allow(http=("http://10.1.2.3/*",)).decide("http://10.1.2.3/")
    assert named.permits("10.1.2.3")
    assert named.permits("::ffff:10.1.2.3")
    assert not named.permits("10.1.2.4")
    assert not named.permits("127.0.0.1")
    local = Allow(http=("http://localhost/*",)).decide("http://localhost/")
    assert local.permits("127.0.0.1")
    assert local.permits("::1")
    assert not local.permits("10.1.2.3")
    assert not local.permits("169.254.169.254")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        ("168.63.129.16", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::1", False),
        ("2002:a9fe:a9fe::", False),
        ("2001:0:53aa:64c:0:fefe:80ff:fffe", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
    ],
)
def test_a_private_address_is_known_in_every_dress(address: str, public: bool) -> None:
    assert is_public_address(address) is public


def test_a_program_is_allowed_by_exactly_its_name_or_path() -> None:
    allow = Allow(exec=("git", "/usr/bin/make"))
    assert allow.decide_program("git").allowed
    assert allow.decide_program("/usr/bin/make").allowed
    for other in (
        "Git",
        "git ",
        "make",
        "/usr/bin/git",
        "./git",
        "bin/../git",
        "/usr/bin/../bin/make",
        "",
        "git\0",
    ):
        assert not allow.decide_program(other).allowed
    assert 'allow: {exec: ["make"]}' in allow.decide_program("make").hint


@pytest.mark.parametrize("name", ["", ".", "..", "*", "./a", "a/b", "a\0"])
def test_a_program_rule_is_a_name_or_an_absolute_path(name: str) -> None:
    with pytest.raises(BadRule):
        Allow(exec=(name,))
