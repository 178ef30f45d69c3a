"""What a file is, from its bytes. The modules are assembled from text by wasmtime."""

from __future__ import annotations

import pytest
import wasmtime
from hypothesis import example, given
from hypothesis import strategies as st

from mvmci import errors
from mvmci.jobs import module

HOST = '(import "mvmci:workflow/host@0.1.0" (instance (export "sleep" (func (param "ms" u64)))))'
RUN = """
  (core module $m (func (export "run")))
  (core instance $i (instantiate $m))
  (func $run (canon lift (core func $i "run")))
  (export "run" (func $run))
"""
WASI_RUN = """
  (core module $m (func (export "run") (result i32) i32.const 0))
  (core instance $i (instantiate $m))
  (func $run (result (result)) (canon lift (core func $i "run")))
  (instance $x (export "run" (func $run)))
"""
FD_WRITE = '(import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))'
START = '(func (export "_start"))'
MEMORY = '(memory (export "memory") 1)'


def assemble(text: str) -> bytes:
    return bytes(wasmtime.wat2wasm(text))


def wasi_command(*imports: str, version: str = "0.2.3") -> str:
    wanted = "".join(f'(import "{name}" (instance))' for name in imports)
    return f'(component {wanted} {WASI_RUN} (export "wasi:cli/run@{version}" (instance $x)))'


def refusal(data: bytes) -> tuple[str, str]:
    with pytest.raises(errors.BadModule) as caught:
        module.inspect_module(data, name="tool.wasm")
    assert caught.value.hint is not None
    return caught.value.message, caught.value.hint


ACCEPTED = [
    (f"(module {FD_WRITE} {START} {MEMORY})", "command", ("wasi_snapshot_preview1.fd_write",)),
    (f"(module {START} {MEMORY})", "command", ()),
    (f"(module {START})", "command", ()),
    (f"(component {HOST} {RUN})", "workflow", ("mvmci:workflow/host@0.1.0",)),
    (f"(component {RUN})", "workflow", ()),
    (f'(component {RUN} (type $t u32) (export "other" (type $t)))', "workflow", ()),
    (wasi_command(), "command", ()),
    (
        wasi_command("wasi:cli/environment@0.2.0", "wasi:io/streams@0.2.12", "wasi:sockets/tcp@0.2.3"),
        "command",
        ("wasi:cli/environment@0.2.0", "wasi:io/streams@0.2.12", "wasi:sockets/tcp@0.2.3"),
    ),
    # What is nested imports and exports for itself.
    (f'(component {RUN} (component (import "x:y/z" (instance)) (export "w" (instance 0))))', "workflow", ()),
    (f'(component {RUN} (core module (import "env" "foo" (func))))', "workflow", ()),
]


@pytest.mark.parametrize(("text", "kind", "imports"), ACCEPTED)
def test_what_runs_here_is_known_by_its_imports_and_exports(
    text: str, kind: str, imports: tuple[str, ...]
) -> None:
    found = module.inspect_module(assemble(text), name="tool.wasm")
    assert (found.kind, found.imports) == (kind, imports)
    assert found.component == text.startswith("(component")


REFUSED = [
    (
        f'(module (import "env" "foo" (func)) {START} {MEMORY})',
        "imports `env.foo`, which is not offered",
        "WASI",
    ),
    (f'(module (import "env" "memory" (memory 1)) {START})', "imports `env.memory`, which is", "preview1"),
    (f'(module (import "env" "t" (table 1 funcref)) {START})', "imports `env.t`, which is", "preview1"),
    (
        f'(module (import "wasi_snapshot_preview1" "fd_write" (global i32)) {START})',
        "imports `wasi_snapshot_preview1.fd_write`, which is not offered",
        "functions",
    ),
    (
        f'(module (import "wasi_snapshot_preview1" "fd_fly" (func)) {START} {MEMORY})',
        "imports `wasi_snapshot_preview1.fd_fly`",
        "functions",
    ),
    (f'(module (import "wasi_unstable" "fd_write" (func)) {START})', "`wasi_unstable`", "wasm32-wasip1"),
    (
        f'(module (import "wasi:cli/exit@0.2.0" "exit" (func)) {START})',
        "`wasi:cli/exit@0.2.0.exit`",
        "component new",
    ),
    (f"(module {MEMORY})", "is no program: it exports no function `_start`", "wasm32-wasip1"),
    (
        f'(module (global (export "_start") i32 (i32.const 0)) {MEMORY})',
        "exports no function `_start`",
        "program",
    ),
    (f'(module (func (export "_initialize")) {MEMORY})', "is a library (a reactor)", "not a library"),
    (f"(module {FD_WRITE} {START})", "calls WASI but exports no `memory`", "--export-memory"),
    (
        f"(component {HOST.replace('0.1.0', '0.2.0')} {RUN})",
        "wants `mvmci:workflow/host@0.2.0`, and what is offered here is `mvmci:workflow/host@0.1.0`",
        "WIT of this version",
    ),
    (f"(component {HOST.replace('@0.1.0', '')} {RUN})", "wants `mvmci:workflow/host`, and", "WIT"),
    (
        f'(component (import "wasi:io/poll@0.2.0" (instance)) {RUN})',
        "imports `wasi:io/poll@0.2.0`",
        "--stub-wasi",
    ),
    (f'(component (import "log" (func)) {RUN})', "imports `log`, which is not offered", "nothing but"),
    (
        f'(component (import "mvmci:workflow/host@0.1.0" (func)) {RUN})',
        "imports `mvmci:workflow/host@0.1.0`",
        "",
    ),
    (
        f"(component {HOST} {WASI_RUN} " + '(export "wasi:cli/run@0.2.3" (instance $x)))',
        "`mvmci:w",
        "only a workflow",
    ),
    (
        wasi_command("wasi:io/streams@0.2.0", "wasi:http/types@0.2.0"),
        "imports `wasi:http/types@0.2.0`",
        "is given",
    ),
    (wasi_command("wasi:io/streams@0.3.0"), "imports `wasi:io/streams@0.3.0`", "version 0.2"),
    (wasi_command("wasi:io/streams@0.2.0-rc-2023-11-10"), "imports `wasi:io/streams@0.2.0-rc", "version 0.2"),
    (
        wasi_command().replace("(component", '(component (import "wasi:io/poll@0.2.0" (component))', 1),
        "imports `wasi:io/poll@0.2.0`, which is not offered",
        "is given",
    ),
    (wasi_command(version="0.3.0"), "not run here: it exports `wasi:cli/run@0.3.0`", "`wasi:cli/run@0.2`"),
    ("(component)", "not run here: it exports nothing", "`run`"),
    ('(component (type $t u32) (export "run" (type $t)))', "not run here: it exports `run`", "`run`"),
    (f"(component {HOST.replace('host', 'hoist')})", "wants `mvmci:workflow/hoist@0.1.0`", ""),
]


@pytest.mark.parametrize(("text", "sentence", "hint"), REFUSED)
def test_what_does_not_run_here_is_refused_by_name(text: str, sentence: str, hint: str) -> None:
    message, given_hint = refusal(assemble(text))
    assert message.startswith("tool.wasm ")
    assert sentence in message
    assert hint in given_hint


NOT_WASM = [
    (b"", "is empty"),
    (b"\0", "is cut short"),
    (b"\0asm\x01\0", "is cut short"),
    (b"\0asm\x02\0\0\0", "unknown version (02 00 00 00)"),
    (b"\0asm\x0a\0\x01\0", "unknown version (0a 00 01 00)"),
    (b"(module)", "text form"),
    (b"\xef\xbb\xbf \n\t;; a comment\n(module)", "text form"),
    (b"\x7fELF\x02\x01\x01\0\0", "a native program"),
    (b"#!/bin/sh\n", "a script"),
    (b"PK\x03\x04....", "a zip archive"),
    (b"\x1f\x8b\x08\0\0\0\0\0\0", "compressed"),
    (b"int main() {}", "is not WebAssembly"),
    (b"\0asm\x01\0\0\0\x02", "ends too early"),
    (b"\0asm\x01\0\0\0\x02\x05\x01", "ends too early"),
    (b"\0asm\x01\0\0\0\x63\x00", "unknown kind 99"),
    (b"\0asm\x01\0\0\0\x02\xff\xff\xff\xff\x7f", "out of bounds"),
    (b"\0asm\x01\0\0\0\x02\x80\x80\x80\x80\x80\x00", "out of bounds"),
    (b"\0asm\x01\0\0\0\x02\x05\xff\xff\xff\xff\x0f", "4,294,967,295 imports or exports"),
    (b"\0asm\x01\0\0\0\x02\x02\x00\x00", "longer than its content"),
    (b"\0asm\x01\0\0\0\x07\x05\x01\x01\xff\x00\x00", "not UTF-8"),
    (b"\0asm\x0d\0\x01\0\x0a\x05\x01\x03\x01a\x05", "a form that is not known"),
    (b"\0asm\x0d\0\x01\0\x0a\x05\x01\x00\x01a\x07", "unknown kind"),
]


@pytest.mark.parametrize(("data", "sentence"), NOT_WASM)
def test_what_is_no_module_is_told_for_what_it_is(data: bytes, sentence: str) -> None:
    assert sentence in refusal(data)[0]


@pytest.mark.parametrize(
    ("text", "imports"),
    [
        ('(import "a" (core module (import "x" "y" (func))))', ("a",)),
        ('(import "b" (type (sub resource)))', ("b",)),
        ('(type $u u32) (import "c" (type (eq $u)))', ("c",)),
        ('(import "d" (value u32))', ("d",)),
        ('(import "e" (component))', ("e",)),
        ('(import "f" (func)) (export "g" (func 0) (func))', ("f",)),
        ('(import "h" (implements "x:y/z@1.0.0") (external-id "zz") (instance))', ("h",)),
        ('(import "i:j/k@1" (versionsuffix ".2.3") (instance))', ("i:j/k@1.2.3",)),
    ],
)
def test_every_form_of_import_is_read_over_exactly(text: str, imports: tuple[str, ...]) -> None:
    # Read one byte too few or too many, and the section would not end where its size says.
    data = assemble(f'(component {text} {WASI_RUN} (export "wasi:cli/run@0.2.0" (instance $x)))')
    assert f"imports `{imports[0]}`" in refusal(data)[0]
    another_world = data.replace(b"wasi:cli/run@0.2.0", b"wasi:cli/run@9.2.0")
    assert "`wasi:cli/run@9.2.0`" in refusal(another_world)[0]


def test_an_older_form_of_names_is_read_the_same() -> None:
    data = assemble(f"(component {HOST} {RUN})")
    older = data.replace(b"\x00\x19mvmci", b"\x01\x19mvmci").replace(b"\x00\x03run\x01", b"\x01\x03run\x01")
    assert older != data
    assert module.inspect_module(older, name="tool.wasm") == module.inspect_module(data, name="tool.wasm")


def test_the_functions_that_are_offered_are_those_that_wasmtime_has() -> None:
    engine = wasmtime.Engine()
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    store = wasmtime.Store(engine)
    assert len(module.PREVIEW1_FUNCTIONS) == 46
    for function in module.PREVIEW1_FUNCTIONS:
        assert linker.get(store, module.PREVIEW1, function) is not None


def test_a_name_from_a_file_cannot_write_to_the_terminal() -> None:
    message, _ = refusal(assemble(f'(module (import "env" "\\1b[2J\\n{"x" * 500}" (func)))'))
    assert message.isprintable()
    assert len(message) < 200
    assert "env.\\u001b[2J\\u000a" in message


def test_a_module_over_the_size_limit_says_the_limit() -> None:
    module.check_module_size(module.MODULE_BYTES_MAX, name="tool.wasm")
    with pytest.raises(errors.BadModule, match=r"tool.wasm has 268,435,457 bytes.*256 MiB"):
        module.check_module_size(module.MODULE_BYTES_MAX + 1, name="tool.wasm")


def test_sections_without_end_are_refused() -> None:
    assert "more than 100,000 sections" in refusal(b"\0asm\x01\0\0\0" + b"\0\0" * 100_001)[0]


def test_every_truncation_of_a_module_is_refused_or_another_module() -> None:
    for text, _, _ in ACCEPTED:
        data = assemble(text)
        for end in range(len(data)):
            inspect_or_refuse(data[:end])


def inspect_or_refuse(data: bytes) -> None:
    try:
        module.inspect_module(memoryview(data), name="tool.wasm")
    except errors.BadModule as refused:
        message, hint = refused.message, refused.hint
    else:
        message, hint = "fine", "fine"
    assert message.isprintable()
    assert hint


VALID = [assemble(text) for text, *_ in [*ACCEPTED, *REFUSED]]


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_refusal(data: bytes) -> None:
    for head in (b"", b"\0asm\x01\0\0\0", b"\0asm\x0d\0\x01\0"):
        inspect_or_refuse(head + data)


@given(st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6))
@example(VALID[0], [])
def test_no_damaged_module_raises_anything_but_a_refusal(data: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    inspect_or_refuse(bytes(damaged))
