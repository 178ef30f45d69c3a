"""A program that a cluster offers is tried before it takes the place of another."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvmci.cli import upgrade
from mvmci.errors import Usage
from mvmci.trust.program import Offer

OFFER = Offer(cluster="demo", machine="x86_64", version="9.9", digest="sha256:0", at=1)


@pytest.mark.parametrize(
    ("text", "within_s", "why"),
    [
        ("import sys; sys.exit('it is damaged')", upgrade.START_S, "it is damaged"),
        ("import time; time.sleep(1e6)", 0.1, "it did not answer in 0.1 s"),
    ],
)
def test_one_that_does_not_start_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, within_s: float, why: str
) -> None:
    monkeypatch.setattr(upgrade, "START_S", within_s)
    program = tmp_path / "new.pyz"
    program.write_text(text)
    with pytest.raises(Usage, match=f"9.9 does not start on this machine, and nothing was changed: {why}"):
        upgrade._try(program, OFFER)
