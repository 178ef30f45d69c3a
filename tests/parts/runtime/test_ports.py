"""Ports that are chosen: where they were, unless somebody listens there, and of those that the user names."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from mvmci.errors import Usage
from mvmci.system.ports import check_port, choose_port
from tests.harness.ports import own_port

LOOPBACK = "127.0.0.1"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """The first of three that may be chosen, and are free."""
    port = next(port for port in iter(own_port, None) if all(_is_free(port + more) for more in (1, 2)))
    monkeypatch.setenv("MVMCI_PORTS", f"{port}-{port + 2}")
    return port


def _is_free(port: int) -> bool:
    with contextlib.suppress(Usage):
        check_port(LOOPBACK, port)
        return True
    return False


@pytest.fixture
def busy(port: int) -> Iterator[int]:
    """One of them, at which somebody listens: that which `broker` is given otherwise."""
    with socket.create_server((LOOPBACK, choose_port("broker"))) as server:
        yield server.getsockname()[1]


def test_it_is_one_of_those_named_and_the_same_again(port: int) -> None:
    chosen = choose_port("broker")
    assert chosen in range(port, port + 3)
    assert choose_port("broker") == chosen


def test_one_that_is_in_use_or_taken_is_passed_over(port: int, busy: int) -> None:
    (left,) = {port, port + 1, port + 2} - {busy, taken := choose_port("broker")}
    assert choose_port("broker", taken=[taken]) == left


def test_where_none_is_free_a_sentence_says_what_to_do(port: int, busy: int) -> None:
    with pytest.raises(Usage, match=f"no port of {LOOPBACK} from {port} to {port + 2} is free") as refused:
        choose_port("broker", taken=[port, port + 1, port + 2])
    assert "MVMCI_PORTS" in refused.value.hint


@pytest.mark.parametrize("text", ["8000", "9-8", "0-10", "1-65536", "a-b", "1-2-3", "²-9", "x" * 9000])
def test_what_is_no_range_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MVMCI_PORTS", text)
    with pytest.raises(Usage, match="which is no range of ports") as refused:
        choose_port("broker")
    assert len(refused.value.message) < 200
