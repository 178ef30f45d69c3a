"""The program without one of the rules that carry its promises, for the runs of `test_mayhem`, `test_moves`.

MVMCI_CHAOS_WITHOUT=fencing pytest tests/faults/chaos/test_mayhem.py              must find faults
MVMCI_CHAOS_WITHOUT=old-engine-last pytest tests/faults/chaos/test_moves.py       too

The rule is taken out of the text of a copy of the source, and the cluster runs that copy. What the same
rules do scene by scene, without luck, is in `test_mutations`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.harness.places import ROOT

SOURCE = ROOT / "mvmci"

Change = tuple[str, str, str]  # a file, what stands there, and what stands there instead

RULES: dict[str, tuple[Change, ...]] = {
    "compare-and-set": (
        (
            "stores/nats/append.py",
            "EXPECTED: str(self.expect),",
            "",
        ),
        (
            "stores/nats/append.py",
            "EXPECTED_OF: self.subtree,",
            "",
        ),
    ),
    # An answer that does not come counts as the one that was hoped for.
    "resolve-loop": (
        (
            "journals/writer.py",
            "            except (Conflict, StoreUnavailable) as refused:\n",
            "            except StoreUnavailable:\n"
            "                data = self.journal.encode(records, message_id)\n"
            "                news = self.journal.absorb([Entry(seq=self.journal.tail + 1, data=data)])\n"
            "            except Conflict as refused:\n",
        ),
    ),
    # A hint is used up before the job that it is for is at its end, and nobody looks for what is left.
    "append-before-acknowledge": (
        (
            "roles/worker.py",
            "        try:\n            outcome = await self.engine.run(",
            "        await hint.ack()\n        try:\n            outcome = await self.engine.run(",
        ),
        ("roles/control_plane.py", 'tasks.create_task(self.reconciler.run(), name="reconcile")', "pass"),
    ),
    # What workers use is taken away before they are told of another.
    "old-engine-last": (("cluster/changes.py", "if keeps_old else action", "if False else action"),),
    # Workers are told of an engine before it is there.
    "engine-before-its-name": (("deploy/up.py", "if moves and there is not None:", "if False:"),),
    # A holder that learns that it was deposed goes on.
    "fencing": (
        (
            "journals/holder.py",
            'if decision == "fenced":',
            'if decision == "fenced" and self.journal.state.corrupt is not None:',
        ),
    ),
}


def write(rule: str, folder: Path) -> Path:
    """Put a copy of the source without `rule` into `folder`; the package in it."""
    package = folder / "mvmci"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, there, instead in RULES[rule]:
        text = (package / name).read_text()
        assert text.count(there) == 1, f"{name} no longer has the rule {rule}: {there}"
        (package / name).write_text(text.replace(there, instead))
    return package
