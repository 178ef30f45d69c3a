"""What a WebAssembly file is, read from its bytes alone: a command, a workflow, or a clear refusal.

It owns the rule of which modules run here: WASI preview 1 programs, WASI 0.2 command components, and
components of world `mvmci:workflow/workflow`. The bytes are hostile: every number and count is bounded,
bodies are skipped by their size, and whatever the bytes are, the only failure is `errors.BadModule`
with one sentence and a hint.

It does not promise that the module is valid. Types, code and whatever is nested are the compiler's to
judge; this pass exists so that a wrong file is refused at once, and by a name that its author knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from mvmci import errors
from mvmci.jobs.job import Kind

MODULE_BYTES_MAX = 256 << 20
SECTIONS_MAX = 100_000
ENTRIES_MAX = 100_000  # imports and exports of one module, each
LEB_BYTES_MAX = 5  # a 32-bit number
_SHOWN_CHARS_MAX = 120
SHOWN_NAMES_MAX = 8

HOST = "mvmci:workflow/host@0.1.0"
PREVIEW1 = "wasi_snapshot_preview1"
_PREVIEW1_TEXT = """
    args_get args_sizes_get environ_get environ_sizes_get clock_res_get clock_time_get
    fd_advise fd_allocate fd_close fd_datasync fd_fdstat_get fd_fdstat_set_flags fd_fdstat_set_rights
    fd_filestat_get fd_filestat_set_size fd_filestat_set_times fd_pread fd_prestat_get fd_prestat_dir_name
    fd_pwrite fd_read fd_readdir fd_renumber fd_seek fd_sync fd_tell fd_write
    path_create_directory path_filestat_get path_filestat_set_times path_link path_open path_readlink
    path_remove_directory path_rename path_symlink path_unlink_file
    poll_oneoff proc_exit proc_raise random_get sched_yield sock_accept sock_recv sock_send sock_shutdown
"""
PREVIEW1_FUNCTIONS = frozenset(_PREVIEW1_TEXT.split())

_WASI_RUN = re.compile(r"wasi:cli/run@0\.2\.[0-9]+", re.ASCII)
_WASI_OFFERED = re.compile(
    r"wasi:(cli|clocks|filesystem|io|random|sockets)/[a-z0-9-]+@0\.2\.[0-9]+", re.ASCII
)

_MAGIC = b"\0asm"
_CORE = b"\x01\0\0\0"
_COMPONENT = b"\x0d\0\x01\0"
_SECTION_ID_MAX = 13
_CORE_KINDS = ("func", "table", "memory", "global", "tag")
_SORTS = ("core", "func", "value", "type", "component", "instance")
_CORE_MODULE = 0x11
_VERSION_SUFFIX = 1

_REBUILD = "Build it or fetch it again: the file seems to be damaged."
_COMMAND_HINT = "Build a program, not a library, for WASI: target wasm32-wasip1 or wasm32-wasip2."
_WORLD_HINT = (
    f"A workflow exports `run` and imports nothing but `{HOST}`; a command exports `wasi:cli/run@0.2`."
)
_STUB_HINT = f"A workflow may import nothing but `{HOST}`; componentize-py leaves WASI out with --stub-wasi."

_OTHER_FORMATS = (
    (
        b"\x7fELF",
        "a native program",
        "A job is WebAssembly: build it for target wasm32-wasip1 or wasm32-wasip2.",
    ),
    (b"#!", "a script", "A job is WebAssembly: give its interpreter, built for WASI, as the module."),
    (b"PK\x03\x04", "a zip archive", "Unpack it and give the .wasm file that is inside."),
    (b"\x1f\x8b", "compressed", "Unpack it with gunzip first."),
)


class Module(msgspec.Struct, frozen=True, kw_only=True):
    """What a file is. `imports` are in the order of the file: `module.name` or a component's names."""

    kind: Kind
    component: bool
    imports: tuple[str, ...]


class _Item(NamedTuple):
    """One import or export; `sort` is `func`, `memory`, `instance` and so on."""

    name: str
    sort: str


def check_module_size(size_bytes: int, *, name: str) -> None:
    """Raises `errors.BadModule` when a module of `size_bytes` is too large to be a job."""
    if size_bytes > MODULE_BYTES_MAX:
        raise errors.BadModule(
            f"{name} has {size_bytes:,} bytes, and a module may have {MODULE_BYTES_MAX:,} (256 MiB)",
            hint="Strip its debug information, or put its data into the workspace (--dir).",
        )


def inspect_module(data: bytes | memoryview, *, name: str) -> Module:
    """What the module `data` is. `name` is what the sentences call it. Raises `errors.BadModule`."""
    view = memoryview(data).cast("B")
    check_module_size(len(view), name=name)
    head = bytes(view[:8])
    if head[:4] != _MAGIC or len(head) < 8:
        raise _not_wasm(bytes(view[:4096]), name)
    if head[4:] == _CORE:
        return _core(view, name)
    if head[4:] == _COMPONENT:
        return _component(view, name)
    raise errors.BadModule(
        f"{name} is WebAssembly of an unknown version ({head[4:].hex(' ')})",
        hint="Build it again with a current toolchain: WebAssembly 1.0, or a released component.",
    )


# Which modules run here.


def _core(view: memoryview, name: str) -> Module:
    imports: list[str] = []
    exports: list[_Item] = []
    for section, body in _sections(view, name):
        if section == 2:
            imports += [item.name for item in _entries(body, _core_import)]
        elif section == 7:
            exports += _entries(body, _core_export)
    _check_core_exports(exports, name, wasi=bool(imports))
    return Module(kind="command", component=False, imports=tuple(imports))


def _check_core_exports(exports: list[_Item], name: str, *, wasi: bool) -> None:
    if _Item("_start", "func") not in exports:
        library = _Item("_initialize", "func") in exports
        what = "is a library (a reactor)" if library else "is no program"
        raise errors.BadModule(f"{name} {what}: it exports no function `_start`", hint=_COMMAND_HINT)
    # Every function of WASI reads or writes its caller's memory; what calls none may go without.
    if wasi and _Item("memory", "memory") not in exports:
        raise errors.BadModule(
            f"{name} calls WASI but exports no `memory`",
            hint='Export it: (memory (export "memory") 1), or the linker\'s option --export-memory.',
        )


def _component(view: memoryview, name: str) -> Module:
    imports: list[_Item] = []
    exports: list[_Item] = []
    for section, body in _sections(view, name):
        if section == 10:
            imports += _entries(body, lambda entry: _Item(_extern_name(entry), _extern_type(entry)))
        elif section == 11:
            exports += _entries(body, _component_export)
    names = tuple(item.name for item in imports)
    _check_host_version(names, name)
    if any(item.sort == "instance" and _WASI_RUN.fullmatch(item.name) for item in exports):
        _check_wasi_imports(imports, name)
        return Module(kind="command", component=True, imports=names)
    if _Item("run", "func") in exports:
        for item in imports:
            if item != (HOST, "instance"):
                hint = _STUB_HINT if item.name.startswith("wasi:") else _WORLD_HINT
                raise _not_offered(item.name, name, hint)
        return Module(kind="workflow", component=True, imports=names)
    offered = _listed([item.name for item in exports])
    raise errors.BadModule(
        f"{name} is a component of a world that is not run here: it exports {offered}", hint=_WORLD_HINT
    )


def _check_host_version(imports: tuple[str, ...], name: str) -> None:
    for wanted in imports:
        if wanted.startswith("mvmci:workflow/") and wanted != HOST:
            raise errors.BadModule(
                f"{name} wants {_shown(wanted)}, and what is offered here is `{HOST}`",
                hint="Build it with the WIT of this version, or run it with the mvmci that it was built for.",
            )


def _check_wasi_imports(imports: list[_Item], name: str) -> None:
    for item in imports:
        if item.sort != "instance" or not _WASI_OFFERED.fullmatch(item.name):
            hint = "A command is given wasi:cli, clocks, filesystem, io, random and sockets of version 0.2."
            if item.name == HOST:
                hint = "It is a command, for it exports `wasi:cli/run`: only a workflow has effects."
            raise _not_offered(item.name, name, hint)


def _check_preview1(module: str, field: str, sort: str, name: str) -> None:
    if module == "wasi_unstable":
        raise errors.BadModule(
            f"{name} was built for `wasi_unstable`, the WASI of before 2020, which is too old",
            hint="Build it again with a current toolchain, for target wasm32-wasip1.",
        )
    if module == PREVIEW1 and field in PREVIEW1_FUNCTIONS and sort == "func":
        return
    hint = f"A command is given the functions of `{PREVIEW1}` and nothing else: {_COMMAND_HINT}"
    if module.startswith(("wasi:", "mvmci:", "cm32p2")):
        hint = "It is the core of a component: make the component of it with `wasm-tools component new`."
    raise _not_offered(f"{module}.{field}", name, hint)


def _not_offered(wanted: str, name: str, hint: str) -> errors.BadModule:
    return errors.BadModule(f"{name} imports {_shown(wanted)}, which is not offered", hint=hint)


def _not_wasm(head: bytes, name: str) -> errors.BadModule:
    if not head:
        return errors.BadModule(f"{name} is empty", hint="Give a .wasm file.")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith((b"(", b";;")):
        return errors.BadModule(
            f"{name} is WebAssembly in its text form",
            hint="Assemble it first: wasm-tools parse FILE.wat -o FILE.wasm.",
        )
    if _MAGIC.startswith(head[:4]):
        return errors.BadModule(f"{name} is cut short: it ends within its first 8 bytes", hint=_REBUILD)
    for magic, what, hint in _OTHER_FORMATS:
        if head.startswith(magic):
            return errors.BadModule(f"{name} is {what}, not WebAssembly", hint=hint)
    return errors.BadModule(
        f"{name} is not WebAssembly", hint="Give a .wasm file: its first bytes are 00 61 73 6d."
    )


def _shown(text: str) -> str:
    """A name out of a hostile file, fit for a terminal and for one line."""
    cut = text if len(text) <= _SHOWN_CHARS_MAX else text[:_SHOWN_CHARS_MAX] + "…"
    return "`" + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in cut) + "`"


def _listed(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - SHOWN_NAMES_MAX} more" if len(names) > SHOWN_NAMES_MAX else ""
    return ", ".join(_shown(name) for name in names[:SHOWN_NAMES_MAX]) + more


# Reading the bytes.


class _Reader:
    """A cursor over `view[at:end]`. All that it reads is bounded by `end`."""

    def __init__(self, view: memoryview, at: int, end: int, name: str) -> None:
        self.view, self.at, self.end, self.name = view, at, end, name

    def byte(self) -> int:
        if self.at >= self.end:
            raise self.bad("ends too early")
        self.at += 1
        return self.view[self.at - 1]

    def u32(self) -> int:
        value = 0
        for index in range(LEB_BYTES_MAX):
            byte = self.byte()
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if value >> 32:
                    break
                return value
        raise self.bad("has a number that is out of bounds")

    def take(self, size: int) -> memoryview:
        if size > self.end - self.at:
            raise self.bad("ends too early")
        self.at += size
        return self.view[self.at - size : self.at]

    def text(self) -> str:
        data = self.take(self.u32())
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            raise self.bad("has a name that is not UTF-8") from None

    def bad(self, what: str) -> errors.BadModule:
        return errors.BadModule(
            f"{self.name} is not valid WebAssembly: it {what}, at byte {self.at}", hint=_REBUILD
        )


def _sections(view: memoryview, name: str) -> Iterator[tuple[int, _Reader]]:
    """Each section's id and body. Nothing in a body is looked at, so what is nested costs nothing."""
    reader = _Reader(view, len(_MAGIC) + len(_CORE), len(view), name)
    for _ in range(SECTIONS_MAX):
        if reader.at == reader.end:
            return
        section = reader.byte()
        if section > _SECTION_ID_MAX:
            raise reader.bad(f"has a section of the unknown kind {section}")
        size = reader.u32()
        start = reader.at
        reader.take(size)
        yield section, _Reader(view, start, start + size, name)
    raise reader.bad(f"has more than {SECTIONS_MAX:,} sections")


def _entries(body: _Reader, read: Callable[[_Reader], _Item]) -> list[_Item]:
    """A section that is a vector of imports or exports, to its very end."""
    items = [read(body) for _ in range(_count(body))]
    if body.at != body.end:
        raise body.bad("has a section that is longer than its content")
    return items


def _count(body: _Reader) -> int:
    count = body.u32()
    if count > ENTRIES_MAX:
        raise body.bad(f"has {count:,} imports or exports, and may have {ENTRIES_MAX:,}")
    return count


def _core_import(body: _Reader) -> _Item:
    """Checked at once: the descriptions of what is not offered need not be understood."""
    module, field = body.text(), body.text()
    kind = body.byte()
    _check_preview1(module, field, _CORE_KINDS[kind] if kind < len(_CORE_KINDS) else "", body.name)
    body.u32()  # the index of the function's type
    return _Item(f"{module}.{field}", "func")


def _core_export(body: _Reader) -> _Item:
    field, kind = body.text(), body.byte()
    if kind >= len(_CORE_KINDS):
        raise body.bad("has an export of an unknown kind")
    body.u32()  # its index
    return _Item(field, _CORE_KINDS[kind])


def _component_export(body: _Reader) -> _Item:
    name, sort = _extern_name(body), _sort(body)
    body.u32()  # its index
    ascribed = body.byte()
    if ascribed > 1:
        raise body.bad("has an export in a form that is not known here")
    if ascribed:
        _extern_type(body)
    return _Item(name, sort)


def _extern_name(body: _Reader) -> str:
    """A component's name: plain (0 and 1 are the same), or with options, of which one ends its version."""
    form = body.byte()
    if form > 2:
        raise body.bad("has a name in a form that is not known here")
    name = body.text()
    for _ in range(_count(body) if form == 2 else 0):
        option, value = body.byte(), body.text()
        if option == _VERSION_SUFFIX:
            name += value
    return name


def _sort(body: _Reader) -> str:
    sort = body.byte()
    if sort >= len(_SORTS):
        raise body.bad("has an import or export of an unknown kind")
    if sort == 0 and body.byte() != _CORE_MODULE:
        raise body.bad("has an import or export of an unknown kind")
    return _SORTS[sort]


def _extern_type(body: _Reader) -> str:
    """The description of an import, read over. Returns its sort."""
    sort = _sort(body)
    if sort == "type":
        bound = body.byte()
        if bound > 1:
            raise body.bad("has a type in a form that is not known here")
        if bound == 1:  # a fresh resource: no index follows
            return sort
    body.u32()
    return sort
