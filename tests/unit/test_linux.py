"""What children are before they become programs."""

from __future__ import annotations

import signal
import subprocess

from mvmci.system.linux import dying_with_us


def test_what_we_start_can_be_stopped_even_if_we_ignore_the_signal() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        process = subprocess.Popen(["sleep", "60"], preexec_fn=dying_with_us())
    finally:
        signal.signal(signal.SIGTERM, before)
    process.terminate()
    assert process.wait() == -signal.SIGTERM
