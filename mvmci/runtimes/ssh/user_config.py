"""What in ~/.ssh/config would have mattered to `ssh`: none of it counts here, which is to be said.

A cluster is to be the same from every machine, and nothing in that file is to turn the checking of host keys
off. This reads enough to name what is meant for a host: its `Host` blocks and what they include.
"""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from mvmci.cluster.topology import HostSection
from mvmci.runtimes.ssh.known_hosts import SSH_PORT, is_named
from mvmci.runtimes.ssh.target import own_name

_DEPTH_MAX = 16  # of files that include others, as in ssh
_NAMES_MAX = 3  # of hosts in one sentence
_FIELDS = {
    "HostName": "address",
    "User": "user",
    "Port": "port",
    "IdentityFile": "key",
    "CertificateFile": "key",
    "ProxyJump": "jump",
    "ProxyCommand": "jump",
    "HostKeyAlias": "host_key",
    "UserKnownHostsFile": "host_key",
    "StrictHostKeyChecking": "host_key",
    "IdentityAgent": "SSH_AUTH_SOCK",
}
_OPTIONS = {option.lower(): option for option in _FIELDS}
_USUAL = {  # what they may say without making a difference
    "Port": (str(SSH_PORT),),
    "ProxyJump": ("none",),
    "ProxyCommand": ("none",),
    "StrictHostKeyChecking": ("yes", "ask"),
    "IdentityFile": ("~/.ssh/id_rsa", "~/.ssh/id_ecdsa", "~/.ssh/id_ed25519"),
}


def ignored(hosts: Mapping[str, HostSection]) -> list[str]:
    """A sentence for each set of options in ~/.ssh/config that `ssh` would heed for some of `hosts`."""
    file = Path("~/.ssh/config").expanduser()
    found: dict[tuple[str, ...], list[str]] = {}
    for name, host in hosts.items():
        told: dict[str, str] = {}
        for option, value in _options(file, host.address or name):
            told.setdefault(option, value)
        if options := tuple(option for option, value in told.items() if _matters(host, option, value)):
            found.setdefault(options, []).append(name)
    return [_sentence(options, names) for options, names in found.items()]


def _sentence(options: tuple[str, ...], names: list[str]) -> str:
    fields = dict.fromkeys(_FIELDS[option] for option in options)
    more = len(names) - _NAMES_MAX
    who = ", ".join(names[:_NAMES_MAX]) + (f" and {more} more" if more > 0 else "")
    instead = ", ".join(name if name.isupper() else f"`{name}:`" for name in fields)
    return f"~/.ssh/config does not count, and has {', '.join(options)} for {who}; what counts is {instead}"


def _matters(host: HostSection, option: str, value: str) -> bool:
    """Whether ssh would do something else than we do for an option that the file has."""
    if value in _USUAL.get(option, ()):
        return False
    field = _FIELDS[option]
    if option == "Port":
        return host.port == SSH_PORT
    if option == "User":
        return host.user is None and value != own_name()
    if option == "HostName" and value == host.address:
        return False
    return field == "SSH_AUTH_SOCK" or option == "HostName" or getattr(host, field) is None


def _options(file: Path, host: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """The options that a file has for `host`, in its order: the first of each counts."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return
    is_meant = True
    for line in lines:
        keyword, _, rest = line.strip().replace("=", " ", 1).partition(" ")
        words = _words(rest)
        if keyword.lower() == "host":
            is_meant = is_named(words, host.lower())
        elif keyword.lower() == "match":
            is_meant = [word.lower() for word in words] == ["all"]  # others ask more than can be known here
        elif is_meant and keyword.lower() == "include" and depth < _DEPTH_MAX:
            for word in words:
                pattern = os.path.join(Path("~/.ssh").expanduser(), os.path.expanduser(word))
                for included in sorted(glob.glob(pattern)):
                    yield from _options(Path(included), host, depth + 1)
        elif is_meant and words and (option := _OPTIONS.get(keyword.lower())):
            yield option, words[0]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:  # a quote is not closed
        return text.split()
