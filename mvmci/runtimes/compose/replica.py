"""What one of several containers of a compose service is called: `worker-2`, while that is its number.

A container is told nothing of its number. But the name server of its network knows its address by the
container's name, which ends in the service and the number: `mvmci-demo_worker_2`, `mvmci-demo-worker-2`.
"""

from __future__ import annotations

import re
import socket
import struct
import time

SERVER = ("127.0.0.11", 53)  # Docker's own, in every network that has a name
_ANSWER_S = 2.0
TRIES = 5
PAUSE_S = 0.5
POINTER, INTERNET = 12, 1
HEADER_BYTES, RECORD_BYTES = 12, 10  # of an answer; of a record, between its name and its data
_QUESTION = struct.pack(">HH", POINTER, INTERNET)


def replica_name(service: str, fallback: str) -> str:
    """The name of this container of `service`; `fallback` where nobody can tell."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_S)
        number = number_in(_ask(_own_address()), service)
        if number is not None:
            return f"{service}-{number}"
    return fallback


def number_in(answer: bytes, service: str) -> str | None:
    """The number in the name that an answer tells, if that ends in the service and a number."""
    found = re.fullmatch(rf"(?:.*[-_])?{re.escape(service)}[-_]([1-9][0-9]{{0,4}})", _first_label(answer))
    return found[1] if found else None


def _first_label(answer: bytes) -> str:
    """The first part of the name in the first record of an answer; empty if it has none."""
    try:
        if not struct.unpack_from(">H", answer, 6)[0]:  # how many records there are
            return ""
        record = _behind_name(answer, HEADER_BYTES) + len(_QUESTION)
        data = _behind_name(answer, record) + RECORD_BYTES
        return answer[data + 1 : data + 1 + answer[data]].decode()
    except (struct.error, IndexError, UnicodeDecodeError):
        return ""


def _behind_name(answer: bytes, at: int) -> int:
    """Where the name that begins at `at` ends."""
    while length := answer[at]:
        if length >= 0xC0:  # it goes on elsewhere
            return at + 2
        at += 1 + length
    return at + 1


def question(address: str) -> bytes:
    """Which name does `address` have?"""
    labels = [*reversed(address.split(".")), "in-addr", "arpa"]
    name = b"".join(bytes([len(label)]) + label.encode() for label in labels)
    return struct.pack(">HHHHHH", 1, 0x100, 1, 0, 0, 0) + name + b"\0" + _QUESTION


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _ask(address: str) -> bytes:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(_ANSWER_S)
            asking.sendto(question(address), SERVER)
            return asking.recv(2048)
    except OSError:
        return b""
