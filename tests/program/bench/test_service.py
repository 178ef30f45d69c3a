"""The server that effects ask."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from urllib.parse import urlsplit

import pytest

from mvmci.bench.service import DELAY_S, serving
from tests.harness.places import ROOT
from tests.harness.waiting import until


def test_it_answers_many_at_a_time_each_after_its_delay() -> None:
    with serving() as url:
        place = urlsplit(url)
        asked = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        several = [socket.create_connection((place.hostname, place.port)) for _ in range(50)]
        began = time.monotonic()
        for one in several:
            one.sendall(asked[:9])
        for one in several:
            one.sendall(asked[9:])
        for one in several:
            assert one.recv(100).endswith(b"ok")
        assert time.monotonic() - began >= DELAY_S
        for one in several:
            one.close()
        with urllib.request.urlopen(url) as answer:
            assert (answer.status, answer.read()) == (200, b"ok")
    assert not listens(url)


def test_an_address_that_is_not_of_this_machine_is_refused() -> None:
    with pytest.raises(OSError, match=r"nothing can listen on 192\.0\.2\.1"), serving("192.0.2.1"):
        pass


def test_it_ends_with_who_started_it_however_that_ends() -> None:
    text = (
        "import time; from mvmci.bench.service import serving\n"
        "with serving() as url: print(url, flush=True); time.sleep(3600)"
    )
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        assert listens(url)
        process.send_signal(signal.SIGKILL)
    until(lambda: not listens(url))


def listens(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((urlsplit(url).hostname, urlsplit(url).port)) == 0
