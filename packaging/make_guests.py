"""Builds the WebAssembly of the examples and of the tests from source, into dist/.

A module is built again when its sources, its command or the version of a tool have changed; a digest
of them stands beside it. It is replaced in one step.

    dist/examples/   c-command, python-workflow, tiny
    dist/guests/     script, component, and one for each tests/guests/commands/*.c
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import wasmtime

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
EXAMPLES = ROOT / "examples"
GUESTS = ROOT / "tests" / "guests"
WIT = ROOT / "mvmci" / "wit"
TOOLS = ("ziglang", "componentize-py", "wasmtime")

CC = [sys.executable, "-m", "ziglang", "cc", "-std=gnu17", "-Os", "-s", "-Wall", "-Wextra", "-Werror"]
PROGRAM = ["--target=wasm32-wasi"]
# What goes into a component that has the memory: its own part of it, and its stack, are below 1 MiB.
PART = ["--target=wasm32-freestanding", "-nostdlib", "-Wl,--no-entry", "-Wl,--import-memory"]
PART += ["-Wl,-z,stack-size=524288"]
COMPONENTIZE = [
    str(Path(sys.executable).parent / "componentize-py"),
    "--quiet",
    "-d",
    str(WIT),
    "-w",
    "workflow",
]
COMPONENTIZE += ["componentize", "--stub-wasi"]
EMPTY_MODULE = b"\x01\x08\0asm\x01\0\0\0"


@dataclass(frozen=True, kw_only=True)
class Module:
    """One file to build: `source` is a .c or .wat file, or a folder with the app.py of a workflow.

    A .wat file that has a .c file of its name beside it is a component around what that becomes.
    """

    target: Path
    source: Path

    def inputs(self) -> list[Path]:
        if self.source.is_dir():
            return sorted([*self.source.glob("*.py"), *WIT.glob("*.wit")])
        return sorted(self.source.parent.glob(f"{self.source.stem}.*"))

    def build(self, output: Path) -> None:
        """Write `output`. Raises CalledProcessError or WasmtimeError, with the tool's reason."""
        part = self.source.with_suffix(".c")
        if self.source.suffix == ".c":
            run_tool([*CC, *PROGRAM, "-o", str(output), str(self.source)])
        elif self.source.suffix == ".wat":
            component = bytes(wasmtime.wat2wasm(self.source.read_text()))
            if part.exists():
                run_tool([*CC, *PART, "-o", str(output), str(part)])
                component = embed(output.read_bytes(), component)
            output.write_bytes(component)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                # A copy, because Python's bytecode is left beside the source.
                for path in self.source.glob("*.py"):
                    shutil.copy(path, scratch)
                run_tool([*COMPONENTIZE, "-p", scratch, "app", "-o", str(output)])


def run_tool(command: list[str]) -> None:
    """The compiler's cache stays in the project, so that nothing outside need be writable."""
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(ROOT / "build" / "zig")}
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)


def embed(module: bytes, component: bytes) -> bytes:
    """Put `module` in the place of the empty core module of `component`: each is a section, with its size."""
    size, rest = b"", len(module)
    while rest >= 0x80:
        size, rest = size + bytes([rest & 0x7F | 0x80]), rest >> 7
    before, after = component.split(EMPTY_MODULE)
    return before + b"\x01" + size + bytes([rest]) + module + after


def modules() -> list[Module]:
    """All that is built; the slow ones first."""
    found = [
        Module(target=DIST / "examples" / "python-workflow.wasm", source=EXAMPLES / "python-workflow"),
        Module(target=DIST / "examples" / "c-command.wasm", source=EXAMPLES / "c-command" / "count.c"),
        Module(target=DIST / "examples" / "tiny.wasm", source=EXAMPLES / "tiny" / "tiny.wat"),
        Module(target=DIST / "guests" / "script.wasm", source=GUESTS / "script" / "script.wat"),
        Module(target=DIST / "guests" / "component.wasm", source=GUESTS / "component" / "component.wat"),
    ]
    for source in sorted((GUESTS / "commands").glob("*.c")):
        found.append(Module(target=DIST / "guests" / f"{source.stem}.wasm", source=source))
    return found


def digest(module: Module) -> str:
    versions = [f"{tool} {importlib.metadata.version(tool)}" for tool in TOOLS]
    total = hashlib.sha256(repr((versions, Path(__file__).read_text())).encode())
    for path in module.inputs():
        total.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def make(module: Module) -> str | None:
    """Build `module` if it is out of date; the reason if that failed."""
    stamp = module.target.with_suffix(".stamp")
    wanted = digest(module)
    if module.target.exists() and stamp.exists() and stamp.read_text() == wanted:
        return None
    module.target.parent.mkdir(parents=True, exist_ok=True)
    part = module.target.with_suffix(".part")
    try:
        module.build(part)
    except subprocess.CalledProcessError as error:
        return f"{module.source.relative_to(ROOT)} could not be built.\n{error.stdout}{error.stderr}"
    except wasmtime.WasmtimeError as error:
        return f"{module.source.relative_to(ROOT)} could not be assembled.\n{error}"
    stamp.unlink(missing_ok=True)
    part.replace(module.target)
    stamp.write_text(wanted)
    print(f"{module.target.relative_to(ROOT)}: {module.target.stat().st_size:,} bytes", flush=True)
    return None


def main() -> int:
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        failures = [reason for reason in pool.map(make, modules()) if reason]
    for reason in failures:
        print(f"Error: {reason}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
