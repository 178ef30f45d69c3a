"""Small guests in text form."""

from __future__ import annotations

import wasmtime


def wasm(text: str) -> bytes:
    return bytes(wasmtime.wat2wasm(text))


def command(body: str, *, memory: str = "1", more: str = "") -> bytes:
    """A preview 1 program whose `_start` is `body`; `$exit`, `$write` are at hand."""
    return wasm(f"""(module
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "path_open"
        (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "path_symlink"
        (func $symlink (param i32 i32 i32 i32 i32) (result i32)))
      (memory (export "memory") {memory})
      {more}
      (func $start (export "_start") {body}))""")


def opens(path: str, *, through_link: bool = False) -> bytes:
    """Exits with the error of opening `path` for reading, 0 if that works."""
    target = path.encode()
    size = f"(i32.const {len(target)})"
    make_link = f"(call $symlink (i32.const 100) {size} (i32.const 3) (i32.const 90) (i32.const 4))"
    name, size = (90, 4) if through_link else (100, len(target))
    return command(
        f"""{f"(drop {make_link})" if through_link else ""}
        (call $exit (call $open (i32.const 3) (i32.const 1) (i32.const {name}) (i32.const {size})
          (i32.const 0) (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 64)))""",
        more=f'(data (i32.const 90) "link") (data (i32.const 100) "{path}")',
    )


def workflow(
    body: str, *, memory: str = "1", imports: str = "", core_imports: str = "", args: str = ""
) -> bytes:
    """A workflow whose `run` (input at $ptr, $len; answer at an address) is `body`."""
    return wasm(f"""(component
      {imports}
      (core module $m
        {core_imports}
        (memory (export "memory") {memory})
        (global $next (mut i32) (i32.const 4096))
        (data (i32.const 16) "denied-by-host")
        (func (export "realloc") (param i32 i32 i32 i32) (result i32)
          (global.set $next (i32.and (i32.add (global.get $next) (i32.const 7)) (i32.const -8)))
          (global.get $next)
          (global.set $next (i32.add (global.get $next) (local.get 3))))
        (func $answer (param $tag i32) (param $at i32) (param $size i32) (result i32)
          (i32.store (i32.const 1024) (local.get $tag))
          (i32.store (i32.const 1028) (local.get $at))
          (i32.store (i32.const 1032) (local.get $size))
          (i32.const 1024))
        (func $run (export "run") (param $ptr i32) (param $len i32) (result i32) {body}))
      (core instance $i (instantiate $m {args}))
      (func (export "run") (param "input" string) (result (result string (error string)))
        (canon lift (core func $i "run") (memory (core memory $i "memory"))
          (realloc (core func $i "realloc")))))""")


ECHO = "(call $answer (i32.const 0) (local.get $ptr) (local.get $len))"

HOST = """(import "mvmci:workflow/host@0.1.0" (instance $host
  (type $header' (record (field "name" string) (field "value" string)))
  (export "header" (type $header (eq $header')))
  (type $request' (record (field "method" string) (field "url" string) (field "headers" (list $header))
    (field "body" string) (field "timeout-ms" u32) (field "idempotent" bool)))
  (export "request" (type $request (eq $request')))
  (type $response' (record (field "status" u16) (field "headers" (list $header)) (field "body" string)
    (field "base64" bool)))
  (export "response" (type $response (eq $response')))
  (type $command' (record (field "argv" (list string)) (field "env" (list $header)) (field "stdin" string)
    (field "timeout-ms" u32) (field "idempotent" bool)))
  (export "command" (type $command (eq $command')))
  (type $exit' (record (field "code" s32) (field "stdout" string) (field "stderr" string)))
  (export "exit" (type $exit (eq $exit')))
  (type $error' (variant (case "interrupted") (case "timed-out") (case "denied" string) (case "lost" string)
    (case "failed" string)))
  (export "effect-error" (type $error (eq $error')))
  (type $level' (enum "debug" "info" "warning" "error"))
  (export "level" (type $level (eq $level')))
  (export "http" (func (param "request" $request) (result (result $response (error $error)))))
  (export "exec" (func (param "command" $command) (result (result $exit (error $error)))))
  (export "sleep" (func (param "ms" u64)))
  (export "log" (func (param "level" $level) (param "message" string)))
  (export "now" (func (result u64)))
  (export "random" (func (result u64)))
  (export "respond" (func (param "value" string)))
  (export "progress" (func (param "done" u32) (param "total" u32) (param "message" string)))))"""
# The host's functions need the memory of the module that needs them: it lies in a module of its own.
_LOWERED = {
    "http": "i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32",
    "exec": "i32 i32 i32 i32 i32 i32 i32 i32 i32",
    "sleep": "i64",
    "log": "i32 i32 i32",
    "respond": "i32 i32",
    "progress": "i32 i32 i32 i32",
}


def calls_host(body: str) -> bytes:
    """A workflow with the whole of `host` as `$http`, `$exec` and so on, its memory at `memory`."""
    funcs = "\n".join(
        f'(core func ${name} (canon lower (func $host "{name}") (memory (core memory $mem "memory")) '
        f'(realloc (core func $mem "realloc"))))'
        for name in (*_LOWERED, "now", "random")
    )
    core = "\n".join(
        f'(import "host" "{name}" (func ${name} (param {types})))' for name, types in _LOWERED.items()
    )
    exports = " ".join(f'(export "{name}" (func ${name}))' for name in (*_LOWERED, "now", "random"))
    return wasm(f"""(component
      {HOST}
      (core module $memory (memory (export "memory") 512) (global $next (mut i32) (i32.const 4096))
        (func (export "realloc") (param i32 i32 i32 i32) (result i32)
          (global.set $next (i32.and (i32.add (global.get $next) (i32.const 7)) (i32.const -8)))
          (global.get $next)
          (global.set $next (i32.add (global.get $next) (local.get 3)))))
      (core instance $mem (instantiate $memory))
      {funcs}
      (core module $m
        (import "mem" "memory" (memory 1))
        {core}
        (import "host" "now" (func $now (result i64)))
        (import "host" "random" (func $random (result i64)))
        (data (i32.const 16) "POST") (data (i32.const 32) "http://example.com/x")
        (data (i32.const 64) "hello")
        (func $answer (param $tag i32) (param $at i32) (param $size i32) (result i32)
          (i32.store (i32.const 1024) (local.get $tag))
          (i32.store (i32.const 1028) (local.get $at))
          (i32.store (i32.const 1032) (local.get $size))
          (i32.const 1024))
        (func (export "run") (param $ptr i32) (param $len i32) (result i32) {body}))
      (core instance $i (instantiate $m (with "mem" (instance $mem)) (with "host" (instance {exports}))))
      (func (export "run") (param "input" string) (result (result string (error string)))
        (canon lift (core func $i "run") (memory (core memory $mem "memory"))
          (realloc (core func $mem "realloc")))))""")


# Asks for one page; its answer is the body, its failure the error's text.
FETCH = """
  (i32.store (i32.const 512) (i32.const 16)) (i32.store (i32.const 516) (i32.const 4))
  (i32.store (i32.const 520) (i32.const 64)) (i32.store (i32.const 524) (i32.const 5))
  (call $http (i32.const 16) (i32.const 4) (i32.const 32) (i32.const 20) (i32.const 512) (i32.const 1)
    (local.get $ptr) (local.get $len) (i32.const 1500) (i32.const 1) (i32.const 256))
  (if (result i32) (i32.load8_u (i32.const 256))
    (then (call $answer (i32.const 1) (i32.load (i32.const 264)) (i32.load (i32.const 268))))
    (else (call $answer (i32.const 0) (i32.load (i32.const 272)) (i32.load (i32.const 276)))))"""
