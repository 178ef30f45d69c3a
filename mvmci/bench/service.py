"""What jobs of the profile `effects` ask: a server of HTTP that answers every request after DELAY_S.

It is a process of its own, so that it takes nothing from what makes the load, and is run as a file, with the
standard library alone: `python service.py ADDRESS` says its port in a line, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

DELAY_S = 0.02
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CONNECTIONS_MAX = 4096  # that wait until they are accepted


@contextmanager
def serving(address: str = "127.0.0.1") -> Iterator[str]:
    """The URL of one that listens on `address` of this machine. Raises OSError."""
    command = [sys.executable, "-I", "-S", __file__, address]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        assert process.stdin is not None and process.stdout is not None
        port = process.stdout.readline().decode().strip()
        if not port:
            raise OSError(f"nothing can listen on {address}")
        try:
            yield f"http://{f'[{address}]' if ':' in address else address}:{port}/"
        finally:
            process.stdin.close()


class Answering(asyncio.Protocol):
    """One connection. Whoever asks sends no body, and not the next before it has the answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._request = b""

    def data_received(self, data: bytes) -> None:
        self._request += data
        if self._request.endswith(b"\r\n\r\n"):
            self._request = b""
            asyncio.get_running_loop().call_later(DELAY_S, self._answer)

    def _answer(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(ANSWER)


async def main(address: str) -> None:
    """Serve until standard input ends."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(Answering, address, 0, backlog=CONNECTIONS_MAX)
    loop.add_reader(sys.stdin.fileno(), over.set)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await over.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
