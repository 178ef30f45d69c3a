"""How wasmtime is set up: plain data, for the slots that apply it and for the cache key.

Owns every setting that shapes compiled code or what a guest may do with its memory and stack. It
imports nothing, so the parent can name the settings without loading the engine.
"""

from __future__ import annotations

import hashlib
import json

MEBIBYTE = 1 << 20

# A guest's stack is the stack of its slot's main thread; interpreters built for WASI ask for 16 MiB.
COMMAND_STACK_BYTES = 16 * MEBIBYTE
# Part of what a workflow can observe: a stack overflow comes at the same fuel only while this stays.
WORKFLOW_STACK_BYTES = 4 * MEBIBYTE
# What the process's own stack must offer above the guest's: the interpreter and the host functions.
STACK_BYTES = 64 * MEBIBYTE
STACK_BYTES_MIN = COMMAND_STACK_BYTES + 8 * MEBIBYTE

# Attributes of `wasmtime.Config`.
COMMAND: dict[str, bool | int | str] = {
    "strategy": "cranelift",
    "cranelift_opt_level": "speed",
    "max_wasm_stack": COMMAND_STACK_BYTES,
    "shared_memory": False,
    "wasm_threads": False,
}
WORKFLOW: dict[str, bool | int | str] = {
    "strategy": "cranelift",
    "cranelift_opt_level": "speed",
    "max_wasm_stack": WORKFLOW_STACK_BYTES,
    "shared_memory": False,
    "wasm_threads": False,
    "consume_fuel": True,
    "cranelift_nan_canonicalization": True,
    "wasm_relaxed_simd_deterministic": True,
    # Collection of garbage is at the engine's leisure, and what it may use is not pinned.
    "wasm_gc": False,
}


def fingerprint(workflow: bool) -> str:
    """Hex SHA-256 of the settings for workflows, or for commands."""
    return hashlib.sha256(json.dumps(WORKFLOW if workflow else COMMAND, sort_keys=True).encode()).hexdigest()
