"""What a workflow may reach: the allow-lists for `http` and `exec`, as values and pure functions.

A rule for `http` is a URL in which `*` matches any run of characters *within its component*: a `*` in
the host never reaches into the path, so that `https://*.example.com/*` does not match
`https://evil.com/?.example.com/`. The path component is path and query together. A lone `*` is every
http and https URL. Scheme and host are compared in lower case, a missing port is the scheme's own.
A rule for `exec` is the name of a program or an absolute path, and matches `argv[0]` exactly.

What is compared is what is sent: `parse` gives the one form of a URL, and `str` of it is what goes
out. Anything that two readers could take for two different URLs is refused instead of being guessed.

Who resolves a name asks `Decision.permits` for each address. A rule with a `*` in its host opens public
addresses alone; one that names the host in full opens wherever that name leads, but for the addresses at
which clouds hand out credentials: those are opened by themselves alone.

Not promised: what an allowed program does, or where an allowed server passes a request on to.
"""

from __future__ import annotations

import ipaddress
import json
import re
from functools import lru_cache

import msgspec

from mvmci.errors import Usage

URL_CHARS_MAX = 8192
RULES_MAX = 1000

SCHEME_PORTS = {"http": 80, "https": 443}

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_HOST = re.compile(r"[a-z0-9_*](?:[a-z0-9_*-]*[a-z0-9_*])?(?:\.[a-z0-9_*](?:[a-z0-9_*-]*[a-z0-9_*])?)*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PERCENT = re.compile(r"%([0-9A-Fa-f]{2})?")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_AS_IT_IS = _UNRESERVED | frozenset(b"!$&'()*+,;=:@/?%")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_V4_COMPATIBLE = ipaddress.IPv6Network("::/96")
_OWN_V6 = ipaddress.IPv6Network("fc00::/7")
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")
_METADATA = frozenset({"100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254"})  # not link-local


class BadRule(Usage, ValueError):
    """A line of an allow-list that means nothing, or something else than it seems to."""


class BadUrl(ValueError):
    """A URL that is refused whatever the list says; the message says why."""


class Url(msgspec.Struct, frozen=True, kw_only=True):
    """The one form of a URL. An IPv6 `host` stands without brackets; `query` starts with `?` or is empty."""

    scheme: str
    host: str
    port: int
    path: str
    query: str = ""

    @property
    def origin(self) -> str:
        """Scheme, host and port; the port is left out where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == SCHEME_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"

    def __str__(self) -> str:
        return self.origin + self.path + self.query


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the http list, taken apart. `port` None is any, 0 the scheme's own."""

    scheme: str
    host: str
    port: int | None
    target: str

    @property
    def in_full(self) -> bool:
        """Whether it names its host, and not a family of hosts."""
        return "*" not in self.host

    def matches(self, url: Url) -> bool:
        """Whether `url` is one of those that this rule allows."""
        port = SCHEME_PORTS[url.scheme] if self.port == 0 else self.port
        return (
            _glob(self.scheme, url.scheme)
            and _glob(self.host, url.host)
            and port in (None, url.port)
            and _glob(self.target, url.path + url.query)
        )


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What the list says; `in_full` where it names the host. `hint` is a sentence for the user."""

    allowed: bool
    in_full: bool = False
    hint: str = ""
    url: Url | None = None

    def permits(self, address: str) -> bool:
        """Whether a connection to `address`, to which the host resolved, is allowed.

        An address in a rule opens itself, `localhost` the loopback, and another name in full whatever it
        leads to but `is_guarded` addresses.
        """
        if is_public_address(address):
            return True
        if not self.in_full or self.url is None:
            return False
        ip = _plain(ipaddress.ip_address(address.partition("%")[0]))
        if _is_localhost(self.url.host):
            return ip.is_loopback
        return str(ip) == self.url.host or not (_is_address(self.url.host) or is_guarded(address))


class Allow(msgspec.Struct, frozen=True, kw_only=True):
    """The two lists. Making one raises BadRule for the first line that is wrong."""

    http: tuple[str, ...] = ()
    exec: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.http) + len(self.exec) > RULES_MAX:
            raise BadRule(f"allow: more than {RULES_MAX} rules")
        for text in self.http:
            rule(text)
        for name in self.exec:
            _check_program(name)

    def decide(self, url: str) -> Decision:
        """Whether `url` may be asked for; addresses are looked at later, with `Decision.permits`."""
        try:
            target = parse(url)
        except BadUrl as refused:
            return Decision(allowed=False, hint=f"refused: {refused}")
        return self.decide_parsed(target)

    def decide_parsed(self, url: Url) -> Decision:
        """The same for a URL that is parsed."""
        matching = [one for one in map(rule, self.http) if one.matches(url)]
        if not matching:
            return Decision(allowed=False, hint=f"not allowed: {url.origin}; {line(url)}", url=url)
        return Decision(allowed=True, in_full=any(one.in_full for one in matching), url=url)

    def decide_program(self, argv0: str) -> Decision:
        """Whether the program `argv0` may be run."""
        if "/" in argv0 and not argv0.startswith("/"):
            return Decision(
                allowed=False,
                hint=f"not allowed: {argv0!r}; a program is a name or an absolute path, not a relative one",
            )
        if argv0 in self.exec:
            return Decision(allowed=True)
        return Decision(
            allowed=False,
            hint=f"not allowed: {argv0!r}; to allow it, add: allow: {{exec: [{json.dumps(argv0)}]}}",
        )


def line(url: Url) -> str:
    """The line that would allow the origin of `url`."""
    return f'to allow it, add: allow: {{http: ["{url.origin}/*"]}}'


def is_public_address(address: str) -> bool:
    """Whether `address` is one of the public internet, also in all the ways to write an IPv4 one in IPv6."""
    ip = _plain(ipaddress.ip_address(address.partition("%")[0]))
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _V4_COMPATIBLE or ip.is_site_local or ip.teredo is not None:
            return False
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.sixtofour
        if inner is not None:
            return is_public_address(str(inner))
    if str(ip) in _METADATA:
        return False
    special = ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_reserved
    return ip.is_global and not (special or ip.is_unspecified)


def is_guarded(address: str) -> bool:
    """Whether no name leads to `address`: link-local ones and their like, where hosts find credentials, and
    private ones in a dress that no resolver has a reason to give.
    """
    ip = _plain(ipaddress.ip_address(address.partition("%")[0]))
    if ip.is_loopback:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        return ip not in _OWN_V6 or str(ip) in _METADATA
    special = ip.is_link_local or ip.is_multicast or ip.is_reserved or ip in _THIS_NETWORK
    return special or str(ip) in _METADATA


def parse(url: str) -> Url:
    """The one form of `url`: lower case, default port, dot segments and needless escapes resolved.

    The fragment is dropped. Raises BadUrl for anything but http and https, for user and password in
    the URL, for control characters, blanks and backslashes, and for hosts that are not plain ASCII
    names or plainly written addresses (`0x7f.1`, `017700000001` and `127.1` are refused).
    """
    if len(url) > URL_CHARS_MAX:
        raise BadUrl(f"a URL of {len(url)} characters is over the limit of {URL_CHARS_MAX}")
    if any(character <= " " or character == "\\" or character.isspace() for character in url) or re.search(
        r"[\x7f-\x9f\ud800-\udfff]", url
    ):
        raise BadUrl("a URL holds no control characters, blanks or backslashes")
    scheme, authority, path, query = _split(url)
    if scheme not in SCHEME_PORTS:
        raise BadUrl(f"only http and https URLs can be asked for, not {scheme[:20]!r}")
    host, port = _authority(authority)
    if "*" in host or port == "*":
        raise BadUrl("a '*' in the host or port of a URL")
    return Url(
        scheme=scheme,
        host=host,
        port=_port(port) or SCHEME_PORTS[scheme],
        path=_path(path),
        query=_escaped(query) if query != "?" else "",
    )


@lru_cache(maxsize=RULES_MAX)
def rule(text: str) -> Rule:
    """The rule that `text` writes. Raises BadRule."""
    if text == "*":
        return Rule(scheme="*", host="*", port=None, target="*")
    try:
        return _rule(text)
    except BadUrl as wrong:
        raise BadRule(
            f"allow: http: {text!r}: {wrong}", hint="a rule looks like https://api.example.com/*"
        ) from None


def _rule(text: str) -> Rule:
    if len(text) > URL_CHARS_MAX or not re.fullmatch(r"[!-~]*", text) or "\\" in text or "#" in text:
        raise BadUrl("a rule is a URL without blanks, backslashes or '#'")
    scheme, authority, path, query = _split(text)
    if not any(_glob(scheme, known) for known in SCHEME_PORTS):
        raise BadUrl("a rule starts with http://, https:// or *://")
    host, port = _authority(authority)
    last = host.rpartition(".")[2]
    if "*" in last and host != "*":
        # `https://example.com*` would allow example.com.evil.org: surely a slash was meant.
        raise BadUrl("a '*' may not end a host: put a slash before it")
    number: int | None = None if port == "*" else _port(port)
    return Rule(scheme=scheme, host=host, port=number, target=_path(path) + _escaped(query))


def _split(text: str) -> tuple[str, str, str, str]:
    scheme, found, rest = text.partition("://")
    if not found:
        raise BadUrl("a URL starts with http:// or https://")
    rest = rest.partition("#")[0]
    end = min((at for at in map(rest.find, "/?") if at >= 0), default=len(rest))
    authority, rest = rest[:end], rest[end:]
    path, mark, query = rest.partition("?")
    return scheme.lower(), authority.lower(), path, mark + query


def _authority(text: str) -> tuple[str, str]:
    if "@" in text:
        raise BadUrl("a URL holds no user or password: use a header")
    if text.startswith("["):
        inside, closed, rest = text[1:].partition("]")
        if not closed or "%" in inside or (rest and not rest.startswith(":")):
            raise BadUrl("a host that is not an address in brackets")
        try:
            return str(_plain(ipaddress.IPv6Address(inside))), rest[1:]
        except ValueError:
            raise BadUrl("a host in brackets that is not an IPv6 address") from None
    host, _, port = text.partition(":")
    host = host.removesuffix(".")
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise BadUrl("a host that is not a plain name (write others in their xn-- form)")
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        try:
            return str(ipaddress.IPv4Address(host)), port
        except ValueError:
            raise BadUrl("an address that is not written as four decimal numbers") from None
    return host, port


def _port(text: str) -> int:
    """0 for none."""
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536):
        raise BadUrl("a port that is not a number from 1 to 65535")
    return int(text)


def _escaped(text: str) -> str:
    """Escapes of harmless characters undone, all others in capitals, and what must be escaped escaped."""

    def one(found: re.Match[str]) -> str:
        if found[1] is None:
            raise BadUrl("a '%' that is not followed by two hexadecimal digits")
        byte = int(found[1], 16)
        return chr(byte) if byte in _UNRESERVED else f"%{byte:02X}"

    plain = _PERCENT.sub(one, text)
    return "".join(chr(byte) if byte in _AS_IT_IS else f"%{byte:02X}" for byte in plain.encode())


def _path(text: str) -> str:
    """The path without `.` and `..`. Raises BadUrl where only some servers would see them."""
    out: list[str] = []
    segments = _escaped(text).split("/")[1:] or [""]
    for segment in segments:
        for part in re.split(r"%2F|%5C", segment):
            if part.partition(";")[0] in (".", "..") and segment not in (".", ".."):
                raise BadUrl("a path with '..' that is hidden behind an escape or a ';'")
        if segment == "..":
            del out[-1:]
        elif segment != ".":
            out.append(segment)
    if segments[-1] in (".", ".."):
        out.append("")
    return "/" + "/".join(out)


def _glob(pattern: str, text: str) -> bool:
    """Whether `text` is `pattern` with something in the place of each `*`; in linear time."""
    first, *others = pattern.split("*")
    if not others:
        return pattern == text
    last = others.pop()
    if len(text) < len(first) + len(last) or not (text.startswith(first) and text.endswith(last)):
        return False
    at, end = len(first), len(text) - len(last)
    for part in others:
        at = text.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


def _plain(ip: _Address) -> _Address:
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return mapped or ip


def _is_address(host: str) -> bool:
    return ":" in host or _NUMBER.fullmatch(host.rpartition(".")[2]) is not None


def _is_localhost(host: str) -> bool:
    return host == "localhost" or host.endswith(".localhost")


def _check_program(name: str) -> None:
    if not name or "\0" in name or name in (".", ".."):
        raise BadRule(f"allow: exec: {name!r} is not the name of a program")
    if "*" in name:
        raise BadRule(f"allow: exec: {name!r}: programs are listed by name", hint="there is no '*' here")
    if "/" in name and not name.startswith("/"):
        raise BadRule(f"allow: exec: {name!r} is a relative path", hint="give its name or its absolute path")
