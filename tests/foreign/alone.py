"""A WASI program under the wasmtime library alone: as little of anything else as there can be.

    python alone.py CODE_CACHE WORKSPACE TMP MODULE [ARG]...

The guest gets this process's streams, the environment in `GUEST_ENV` (JSON, a list of pairs), WORKSPACE as
`/` and TMP as `/tmp`. How it ended goes to the file descriptor in `ENDED_FD`: `exit: N` or `trap: TEXT`.
It imports nothing of the project.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import wasmtime


def compiled(engine: wasmtime.Engine, cache: Path, module: Path) -> wasmtime.Module:
    """The module, from the cache if it was compiled before: compiling is what takes the time."""
    code = module.read_bytes()
    kept = cache / hashlib.sha256(code).hexdigest()
    if kept.exists():
        return wasmtime.Module.deserialize_file(engine, str(kept))
    made = wasmtime.Module(engine, code)
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_bytes(made.serialize())
    part.replace(kept)
    return made


def main(cache: str, workspace: str, tmp: str, module: str, *args: str) -> str:
    engine = wasmtime.Engine()
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    wasi = wasmtime.WasiConfig()
    wasi.argv = [Path(module).name, *args]
    wasi.env = [tuple(pair) for pair in json.loads(os.environ["GUEST_ENV"])]
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    wasi.preopen_dir(workspace, "/")
    wasi.preopen_dir(tmp, "/tmp")
    store = wasmtime.Store(engine)
    store.set_wasi(wasi)
    try:
        instance = linker.instantiate(store, compiled(engine, Path(cache), Path(module)))
        start = instance.exports(store)["_start"]
        assert isinstance(start, wasmtime.Func)
        start(store)
    except wasmtime.ExitTrap as ended:
        return f"exit: {ended.code}"
    except (wasmtime.Trap, wasmtime.WasmtimeError) as ended:
        return f"trap: {ended}"
    return "exit: 0"


if __name__ == "__main__":
    how = main(*sys.argv[1:])
    os.write(int(os.environ["ENDED_FD"]), how.encode())
