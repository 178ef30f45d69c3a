"""Runs guests: the inside of a slot process, and the only module that loads wasmtime.

Owns the engines and what a guest can import. A command is a WASI program and the only task of its
slot; workflows follow each other in one slot, each in a store of its own that is closed after it;
compiling turns a module into code that the other two map. A slot trusts its parent and nothing else.
It promises a true account of how a guest ended, as long as the guest stays inside WebAssembly; the
parent believes nothing that it could not survive being false.

Limits. `stack` and `fuel` are traps. Memory beyond the limit is refused to the guest, which then
decides what to do; the engine does not say that it happened. So `memory` is named when a guest that
failed (a trap, or an exit code other than 0) ended with `size + max(1 MiB, limit / 8) > limit`: it
could not have grown much more. A guest that asked for a lot at once ends with the trap's text alone.
Code that cannot be mapped ends the slot, not the job: the parent fetches it anew.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import wasmtime
import wasmtime._ffi as ffi
from wasmtime import component as components

from mvmci.errors import BadModule
from mvmci.jobs.module import HOST, check_module_size, inspect_module
from mvmci.sandbox import frames, settings, wire, wit, world
from mvmci.sandbox.determinism import Chance, VirtualClock

MEMORIES_MAX_OF_COMPONENT = 8
INSTANCES_MAX = 256  # core instances and memories' owners inside one component
TABLES_MAX = 256
TABLE_ELEMENTS_MAX = 1 << 20
LOADED_MAX = 4  # workflows that a slot keeps mapped
MARGIN_BYTES_MIN = 1 << 20
TEXT_CHARS_MAX = 500
EXIT_CODE_MAX = 255
_READ_BYTES = 1 << 20

OWN = ("log", "now", "random", "respond", "progress")  # functions of the world that are no effects
GUEST_TMP = "/tmp"  # noqa: S108 - a path inside the guest


class Exited(Exception):
    """A preview 1 program called `proc_exit`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class CallRefused(Exception):
    """A host function does not do what the guest asked; the guest ends in a trap with this text."""


class Invalid(Exception):
    """The module is not something that this engine runs."""


class Engines:
    """The engines and linkers, made once before the first fork."""

    def __init__(self) -> None:
        self.command = _engine(settings.COMMAND)
        self.workflow = _engine(settings.WORKFLOW)
        self.preview1 = wasmtime.Linker(self.command)
        self.preview1.allow_shadowing = True
        self.preview1.define_wasi()
        # The engine's own `proc_exit` refuses codes from 126 up; a program may have any.
        exits = wasmtime.FuncType([wasmtime.ValType.i32()], [])
        self.preview1.define_func("wasi_snapshot_preview1", "proc_exit", exits, _proc_exit)
        self.preview2 = components.Linker(self.command)
        self.preview2.add_wasip2()
        self.host = HostFunctions()
        self.world = components.Linker(self.workflow)
        with self.world.root() as root, root.add_instance(HOST) as instance:
            for name, function in wit.functions().items():
                own = getattr(self.host, name) if name in OWN else self.host.effect(name, function)
                instance.add_func(name, own)


def _engine(attributes: dict[str, bool | int | str]) -> wasmtime.Engine:
    config = wasmtime.Config()
    for name, value in attributes.items():
        setattr(config, name, value)
    # The engine wants its (unused) asynchronous stacks to be larger than the others.
    ffi.wasmtime_config_async_stack_size_set(
        config.ptr(), int(attributes["max_wasm_stack"]) + settings.MEBIBYTE
    )
    return wasmtime.Engine(config)


def _proc_exit(code: int) -> NoReturn:
    raise Exited(code)


_engines: Engines | None = None


def prepare_slot() -> None:
    """Make the engines, before any fork."""
    global _engines
    # WASI runs on threads of its own; one that waits is enough for one guest.
    os.environ["TOKIO_WORKER_THREADS"] = "1"
    _engines = Engines()


def serve_slot(name: str, socket: int, meter: int, streams: int) -> None:
    """Run tasks of profile `name` from `socket` until the parent closes it, or one if it is not reused.

    `meter` is the open `/proc/self/statm`, `streams` the first of the descriptors passed to a compile.
    """
    engines = _engines
    assert engines is not None
    workflows = Workflows(engines, socket, Meter(meter))
    while True:
        task = wire.read_task(socket)
        match task:
            case None:
                return
            case frames.RunWorkflow() if name == "workflow":
                wire.send(socket, workflows.run(task))
                continue
            case frames.RunCommand() if name == "command":
                ended = execute_command(engines, task, Meter(meter))
            case frames.Compile() if name == "compile":
                ended = compile_module(engines, task, streams, streams + 1)
            case _:
                raise AssertionError(f"a slot for {name} got {task}")
        wire.send(socket, ended)
        return


class Meter:
    """How much writable memory the process has taken since the start of a task."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._page = os.sysconf("SC_PAGE_SIZE")
        self.start()

    def start(self) -> None:
        """Count from here."""
        self._base = self._bytes()

    def taken(self) -> int:
        """Bytes since `start`: the guest's memory, and little else."""
        return self._bytes() - self._base

    def _bytes(self) -> int:
        return int(os.pread(self._fd, 256, 0).split()[5]) * self._page


# ---- commands


def execute_command(engines: Engines, task: frames.RunCommand, meter: Meter) -> frames.Ended:
    """Run a WASI program to its end."""
    store = wasmtime.Store(engines.command)
    _limit(store, task.memory_bytes, component=task.component)
    try:
        store.set_wasi(_wasi(task))
        code = _run_preview2(engines, store, task) if task.component else _run_preview1(engines, store, task)
    except Exited as exited:
        code = exited.code
    except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
        if isinstance(error, wasmtime.ExitTrap):
            code = error.code
        else:
            return _trapped(error, meter.taken(), task.memory_bytes)
    except Invalid as error:
        return frames.Ended(outcome="invalid", text=str(error))
    if code == 0:
        return frames.Ended(outcome="ok", code=0)
    # Codes are a byte, as everywhere; one that would turn into success is kept a failure.
    code = code if 0 <= code <= EXIT_CODE_MAX else code & EXIT_CODE_MAX or EXIT_CODE_MAX
    full = _is_full(meter.taken(), task.memory_bytes)
    return frames.Ended(outcome="exit", code=code, limit="memory" if full else None)


def _wasi(task: frames.RunCommand) -> wasmtime.WasiConfig:
    if any("\0" in text for text in (*task.args, *(part for pair in task.env for part in pair))):
        raise Invalid("an argument or a variable of the environment contains a zero byte")
    wasi = wasmtime.WasiConfig()
    wasi.argv = list(task.args)
    wasi.env = [list(pair) for pair in task.env]
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    wasi.preopen_dir(task.workspace, "/")
    if task.tmp:
        wasi.preopen_dir(task.tmp, GUEST_TMP)
    return wasi


def _run_preview1(engines: Engines, store: wasmtime.Store, task: frames.RunCommand) -> int:
    module = _map(wasmtime.Module, engines.command, task.code)
    start = engines.preview1.instantiate(store, module).exports(store)["_start"]
    assert isinstance(start, wasmtime.Func)
    start(store)
    return 0


def _run_preview2(engines: Engines, store: wasmtime.Store, task: frames.RunCommand) -> int:
    component = _map(components.Component, engines.command, task.code)
    name = next(name for name in component.type.exports(engines.command) if name.startswith(world.CLI_RUN))
    instance = engines.preview2.instantiate(store, component)
    run = instance.get_func(store, _index(component, name, "run"))
    assert run is not None
    result = run(store)
    return 0 if result is None or getattr(result, "tag", None) == "ok" else 1


def _index(component: components.Component, instance: str, name: str) -> components.ExportIndex:
    outer = component.get_export_index(instance)
    inner = component.get_export_index(name, outer)
    if inner is None:
        raise Invalid(f"the component's `{instance}` has no `{name}`")
    return inner


def _limit(store: wasmtime.Store, memory_bytes: int, *, component: bool) -> None:
    store.set_limits(
        memory_size=memory_bytes,
        memories=MEMORIES_MAX_OF_COMPONENT if component else 1,
        table_elements=TABLE_ELEMENTS_MAX,
        tables=TABLES_MAX,
        instances=INSTANCES_MAX if component else 1,
    )


Code = TypeVar("Code", wasmtime.Module, components.Component)


def _map(kind: type[Code], engine: wasmtime.Engine, path: str) -> Code:
    try:
        return kind.deserialize_file(engine, path)
    except wasmtime.WasmtimeError:
        os._exit(wire.EXIT_NO_CODE)


# ---- workflows


class HostFunctions:
    """The functions of `mvmci:workflow/host`, for the one workflow that runs."""

    socket: int
    clock: VirtualClock
    chance: Chance

    def effect(self, name: str, function: wit.Function) -> Callable[..., Any]:
        """The function that asks the parent for an effect of kind `name`, and waits for its answer."""
        fields = function.fields

        def ask(_store: object, *passed: Any) -> Any:
            if fields is not function.parameters:
                passed = tuple(getattr(passed[0], field) for field, _ in fields)
            values = zip(fields, passed, strict=True)
            request = {field.replace("-", "_"): _plain(value, type_) for (field, type_), value in values}
            answer = self._call({"kind": name, **request})
            if answer["kind"] == "error":
                return _error(name, function, answer["why"], answer.get("text", ""))
            return _returned_value(answer, function.returns)

        return ask

    def log(self, _store: object, level: Any, message: str) -> None:
        """See the workflow world, as for the others here."""
        self._send(frames.Log(level=level, message=message))

    def now(self, _store: object) -> int:
        return self.clock.now()

    def random(self, _store: object) -> int:
        return self.chance.next()

    def respond(self, _store: object, value: str) -> None:
        self._send(frames.Respond(value=value))

    def progress(self, _store: object, done: int, total: int, message: str) -> None:
        self._send(frames.ReportProgress(done=done, total=total, message=message))

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        self._send(frames.Call(request=request))
        answer = wire.read_task(self.socket)
        if answer is None:
            os._exit(0)  # the parent lets go: nothing of this run may go on
        assert isinstance(answer, frames.Answer)
        self.clock.consume(answer.now_ms)
        return answer.value

    def _send(self, frame: frames.Frame) -> None:
        try:
            data = frames.encode(frame)
        except ValueError as error:
            raise CallRefused(f"what the workflow passes to the host is too large: {error}") from None
        try:
            wire.write_all(self.socket, data)
        except OSError:
            os._exit(0)


class _Outcome:
    """The type `result<string, string>`, as the bindings want one to convert a value by."""

    def convert_from_c(self, value: Any) -> components.Variant:
        if value.kind != ffi.WASMTIME_COMPONENT_RESULT.value:
            raise CallRefused("`run` does not return a result<string, string>")
        inner = value.of.result.val
        if not inner or inner.contents.kind != ffi.WASMTIME_COMPONENT_STRING.value:
            raise CallRefused("`run` does not return a result<string, string>")
        text = ffi.to_str(inner.contents.of.string)
        ffi.wasmtime_component_val_delete(inner)
        return components.Variant("ok" if value.of.result.is_ok else "err", text)


class _RunType:
    """That of a workflow's `run`. The engine checks what is passed to it."""

    params = (("input", components.String()),)
    result = _Outcome()


class _Run(components.Func):
    """`run` of one instance: asking the engine for its type takes as long as all the rest of a short call."""

    def type(self, store: object) -> Any:
        return _RunType


class _Loaded:
    """A workflow that is mapped."""

    def __init__(self, component: components.Component) -> None:
        self.component = component
        self._run = component.get_export_index("run")

    def instantiate(self, linker: components.Linker, store: wasmtime.Store) -> components.Func:
        """`run` of a new instance in `store`."""
        instance = linker.instantiate(store, self.component)
        assert self._run is not None
        run = instance.get_func(store, self._run)
        assert run is not None
        run.__class__ = _Run
        return run


class Workflows:
    """Runs workflows one after the other, and keeps the last few mapped."""

    def __init__(self, engines: Engines, socket: int, meter: Meter) -> None:
        self._engines = engines
        self._meter = meter
        self._loaded: dict[str, _Loaded] = {}
        engines.host.socket = socket

    def run(self, task: frames.RunWorkflow) -> frames.Ended:
        """Run one from its beginning, in a store that is gone when this returns."""
        loaded = self._load(task.code)
        host = self._engines.host
        host.clock, host.chance = VirtualClock(task.now_ms), Chance(task.seed)
        self._meter.start()
        store = wasmtime.Store(self._engines.workflow)
        try:
            store.set_fuel(task.fuel)
            _limit(store, task.memory_bytes, component=True)
            result = loaded.instantiate(self._engines.world, store)(store, task.input)
            full = result.tag != "ok" and _is_full(self._meter.taken(), task.memory_bytes)
            return _returned(result, full=full)
        except (wasmtime.WasmtimeError, CallRefused, MemoryError) as error:
            return _trapped(error, self._meter.taken(), task.memory_bytes)
        finally:
            store.close()

    def _load(self, path: str) -> _Loaded:
        loaded = self._loaded.pop(path, None)
        if loaded is None:
            loaded = _Loaded(_map(components.Component, self._engines.workflow, path))
        self._loaded[path] = loaded
        if len(self._loaded) > LOADED_MAX:
            del self._loaded[next(iter(self._loaded))]
        return loaded


def _returned(result: components.Variant, *, full: bool) -> frames.Ended:
    text = result.payload or ""
    if result.tag == "ok":
        ended = frames.Ended(outcome="ok", text=text)
    else:
        ended = frames.Ended(outcome="err", text=text, limit="memory" if full else None)
    try:
        frames.encode(ended)
    except ValueError as error:
        return frames.Ended(outcome="trap", text=f"what the workflow returns is too large: {error}")
    return ended


def _plain(value: Any, type_: wit.Type) -> Any:
    """What a guest passed, for JSON."""
    match type_.kind:
        case "record" if type_.name == "header":
            return (value.name, value.value)
        case "record":
            return {
                name.replace("-", "_"): _plain(getattr(value, name), part)
                for name, part in type_.parts
                if part is not None
            }
        case "list":
            element = type_.parts[0][1]
            assert element is not None
            return [_plain(one, element) for one in value]
        case _:
            return value


def _guests(value: Any, type_: wit.Type) -> Any:
    """What a guest gets for what JSON says. What is absent is the zero of its type."""
    match type_.kind:
        case "record":
            if type_.name == "header":
                value = dict(zip(("name", "value"), value, strict=True))
            record = components.Record()
            for name, part in type_.parts:
                assert part is not None
                setattr(record, name, _guests(value.get(name.replace("-", "_")), part))
            return record
        case "list":
            element = type_.parts[0][1]
            assert element is not None
            return [_guests(one, element) for one in value or ()]
        case "string":
            return value or ""
        case "bool":
            return bool(value)
        case _:
            return value or 0


def _returned_value(answer: dict[str, Any], type_: wit.Type | None) -> Any:
    if type_ is None:
        return None
    return _guests(answer if type_.kind == "record" else answer.get("value"), type_)


def _error(name: str, function: wit.Function, why: str, text: str) -> components.Variant:
    """The `effect-error` that a function returns. Raises CallRefused for one that cannot."""
    error = function.result.parts[1][1] if function.result is not None and function.fails else None
    if error is None:
        raise CallRefused(f"{name}: {text or why}")
    return components.Variant(why, text if dict(error.parts)[why] is not None else None)


# ---- how a guest ended


# What the engine says of system calls that fail before any guest runs.
_OF_HOST = re.compile(r"mmap failed to reserve|(unable|failed) to make memory executable")
_OF_LINKING = ("unknown import", "incompatible import", "a matching implementation was not found")


def _is_full(size: int, limit: int) -> bool:
    return size + max(MARGIN_BYTES_MIN, limit // 8) > limit


def _trapped(error: Exception, size: int, limit: int) -> frames.Ended:
    text = str(error)
    reason = _reason(text)
    if _OF_HOST.match(reason):
        return frames.Ended(outcome="host", text=_clip(reason))
    name = None
    if "call stack exhausted" in reason:
        name = "stack"
    elif "all fuel consumed" in reason:
        name = "fuel"
    elif any(phrase in reason for phrase in _OF_LINKING):
        return frames.Ended(outcome="invalid", text=_clip(reason))
    elif "exceeds memory limits" in reason or isinstance(error, MemoryError) or _is_full(size, limit):
        name = None if isinstance(error, CallRefused) else "memory"
    where = _innermost(error, text)
    return frames.Ended(outcome="trap", text=_clip(f"{reason} in `{where}`" if where else reason), limit=name)


def _reason(text: str) -> str:
    """The cause in one line, without the backtrace."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("wasm trap: "):
            return line.removeprefix("wasm trap: ")
    return lines[0] if lines else "trap without a reason"


def _innermost(error: Exception, text: str) -> str:
    """The guest function that trapped, as far as the module has names."""
    if isinstance(error, wasmtime.Trap):
        return next((frame.func_name for frame in error.frames if frame.func_name), "")
    first = next((line for line in text.splitlines() if line.strip().startswith("0: ")), "")
    return first.partition("!")[2].strip()


def _clip(text: str) -> str:
    line = "".join(char if char.isprintable() else " " for char in text)
    return line if len(line) <= TEXT_CHARS_MAX else line[: TEXT_CHARS_MAX - 1] + "…"


# ---- compiling


def compile_module(engines: Engines, task: frames.Compile, source: int, target: int) -> frames.Ended:
    """Compile the module behind `source` to `target`, or say why it cannot run here."""
    try:
        wasm = _read_module(source)
        found = inspect_module(wasm, name="it")
        if (found.component, found.kind == "workflow") != (task.component, task.workflow):
            raise Invalid(f"it is a {found.kind}, and its job takes it for something else")
        if task.look and not task.component:
            wasmtime.Module.validate(engines.command, wasm)
            return frames.Ended(outcome="ok")
        code = (
            _compile_component(engines, wasm, task.workflow)
            if task.component
            else _compile_core(engines, wasm)
        )
        if not task.look:
            wire.write_all(target, code)
    except wasmtime.WasmtimeError as error:
        text = _flat(str(error))
        return frames.Ended(outcome="host" if _OF_HOST.match(text) else "invalid", text=_clip(text))
    except (BadModule, Invalid) as error:
        return frames.Ended(outcome="invalid", text=_clip(str(error)))
    except MemoryError:
        return frames.Ended(outcome="host", text=frames.NO_MEMORY)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise  # a full disk is no fault of the module
        return frames.Ended(outcome="invalid", text="its compiled code is larger than is allowed")
    return frames.Ended(outcome="ok")


def _read_module(source: int) -> bytes:
    check_module_size(os.fstat(source).st_size, name="it")
    parts = []
    while part := os.read(source, _READ_BYTES):
        parts.append(part)
    return b"".join(parts)


def _compile_core(engines: Engines, wasm: bytes) -> bytearray:
    module = wasmtime.Module(engines.command, wasm)
    try:
        engines.preview1.instantiate_pre(module)  # resolves the imports and runs nothing
    except wasmtime.WasmtimeError as error:
        raise Invalid(_reason(str(error))) from None
    return module.serialize()


def _compile_component(engines: Engines, wasm: bytes, workflow: bool) -> bytearray:
    engine = engines.workflow if workflow else engines.command
    component = components.Component(engine, wasm)
    if workflow and (wrong := world.mismatch(component, engine)):
        raise Invalid(wrong)
    return component.serialize()


def _flat(text: str) -> str:
    return ": ".join(
        line.strip() for line in text.splitlines() if line.strip() and line.strip() != "Caused by:"
    )
