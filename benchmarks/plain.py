"""The same modules under the wasmtime library alone, in this process and with nothing around them.

python -m benchmarks.plain command|workflow MODULE RUNS      prints the milliseconds of each run, as JSON
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import wasmtime
from wasmtime import component


def command(module: Path) -> Callable[[], None]:
    """A run of a WASI preview 1 program: compiled code mapped, an empty workspace, output to /dev/null."""
    engine = wasmtime.Engine()
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    code = Path(tempfile.mkdtemp()) / "code"
    code.write_bytes(wasmtime.Module.from_file(engine, str(module)).serialize())
    workspace = tempfile.mkdtemp()

    def run() -> None:
        store = wasmtime.Store(engine)
        wasi = wasmtime.WasiConfig()
        wasi.argv = [module.name]
        wasi.stdout_file = wasi.stderr_file = os.devnull
        wasi.preopen_dir(workspace, "/")
        store.set_wasi(wasi)
        loaded = wasmtime.Module.deserialize_file(engine, str(code))
        start = linker.instantiate(store, loaded).exports(store)["_start"]
        assert isinstance(start, wasmtime.Func)
        try:
            start(store)
        except wasmtime.ExitTrap as ended:
            if ended.code != 0:
                raise
        store.close()

    return run


def workflow(module: Path) -> Callable[[], None]:
    """A run of a component that imports nothing."""
    config = wasmtime.Config()
    config.consume_fuel = True
    engine = wasmtime.Engine(config)
    linker = component.Linker(engine)
    loaded = component.Component.from_file(engine, str(module))

    def run() -> None:
        store = wasmtime.Store(engine)
        store.set_fuel(10**9)
        function = linker.instantiate(store, loaded).get_func(store, "run")
        assert function is not None
        function(store, "null")
        store.close()

    return run


def main() -> None:
    """Run it, and say how long each run took."""
    kind, module, runs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    run = command(module) if kind == "command" else workflow(module)
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1000)
    print(json.dumps(times))


main()
