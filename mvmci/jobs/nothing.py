"""The smallest command: it does nothing, and so shows that guests can run at all. As text:

(module (memory (export "memory") 1) (func (export "_start")))
"""

from __future__ import annotations

import hashlib

from mvmci.jobs.job import Limits
from mvmci.jobs.journal import Spec

NOTHING = bytes.fromhex(
    "0061736d 01000000  01 04 01 60 00 00  03 02 01 00  05 03 01 00 01"
    "07 13 02 06 6d656d6f7279 02 00 06 5f7374617274 00 00  0a 04 01 02 00 0b"
)
DIGEST = f"sha256:{hashlib.sha256(NOTHING).hexdigest()}"


def nothing(job: str, *, queue: str, at: int, by: str, timeout_ms: int) -> Spec:
    """A job that does it."""
    return Spec(
        at=at,
        id=job,
        queue=queue,
        kind="command",
        module=DIGEST,
        name="nothing.wasm",
        component=False,
        limits=Limits(timeout_ms=timeout_ms),
        seed=0,
        by=by,
    )
