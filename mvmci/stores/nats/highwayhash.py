"""HighwayHash-64 over the records of a nats-server block, a whole block a call.

nats-server guards every record by eight bytes of this hash, for which Python has no library that is kept.
It is some lines of WebAssembly, which wasmtime runs at the speed of a disk; in Python it would take a
thousand times as long. The algorithm is that of its authors' paper (arXiv:1612.06257), with its constants.

In the module's memory: the key at 0, one padded packet at 32, one record put together at `ROOM`, the data at
`DATA`. A record is a length of 4 bytes (the topmost bit: it has headers), sequence 8, time 8, length of the
subject 2, subject, with headers their length 4, headers and message, hash 8. The hash is over sequence, time,
subject, headers and message.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
from typing import Any

_MUL0 = (0xDBE6D5D5FE4CCE2F, 0xA4093822299F31D0, 0x13198A2E03707344, 0x243F6A8885A308D3)
_MUL1 = (0x3BD39E10CB0EF593, 0xC0ACF169B5F18A8C, 0xBE5466CF34E90C6C, 0x452821E638D01377)
RECORD_BYTES_MAX = 2 << 20
ROOM, DATA = 64, 64 + RECORD_BYTES_MAX
_PAGE = 1 << 16


class Hasher:
    """The hash under one `key` of 32 bytes, over `data`, which is kept and may be changed in place."""

    def __init__(self, key: bytes, data: bytes) -> None:
        import wasmtime

        self._store = wasmtime.Store(_module()[0])
        instance = wasmtime.Instance(self._store, _module()[1], [])
        exports: Any = instance.exports(self._store)
        self._calls = {name: exports[name] for name in ("scan", "find", "mend", "mend_all", "hash_all")}
        memory = exports["memory"]
        more = DATA + len(data) + 64 - memory.data_len(self._store)
        if more > 0:
            memory.grow(self._store, more // _PAGE + 1)
        self._base = ctypes.addressof(memory.data_ptr(self._store).contents)
        self.size = len(data)
        ctypes.memmove(self._base, key, 32)
        ctypes.memmove(self._base + DATA, data, len(data))

    @property
    def data(self) -> bytes:
        """The bytes as they are now."""
        return ctypes.string_at(self._base + DATA, self.size)

    def write(self, at: int, data: bytes) -> None:
        """Put `data` at a place in the bytes."""
        assert at + len(data) <= self.size
        ctypes.memmove(self._base + DATA + at, data, len(data))

    def scan(self, at: int = 0, *, seal: bool = False) -> int:
        """Where the first record from `at` on is that is not whole; the size if all are.

        With `seal`, their hashes are written instead of compared.
        """
        return int(self._call("scan", DATA + at, DATA + self.size, int(seal))) - DATA

    def find(self, at: int) -> int:
        """Where the next whole record begins, from `at` on; the size if there is none."""
        return int(self._call("find", DATA + at, DATA + self.size)) - DATA

    def mend(self, at: int, size: int) -> int:
        """Turn back the one bit among `size` bytes from `at` that keeps the record there from being whole.

        Its number; -1 if it is not one bit.
        """
        return int(self._call("mend", DATA + at, DATA + self.size, size * 8))

    def sum(self) -> bytes:
        """The hash of all the bytes."""
        return (int(self._call("hash_all", self.size)) & (1 << 64) - 1).to_bytes(8, "little")

    def mend_all(self, expected: bytes) -> int:
        """Turn back the one bit that keeps the hash of all the bytes from being what is `expected`."""
        return int(self._call("mend_all", self.size, int.from_bytes(expected, "little", signed=True)))

    def _call(self, name: str, *arguments: int) -> Any:
        return self._calls[name](self._store, *arguments)


@functools.cache
def _module() -> tuple[Any, Any]:
    import wasmtime

    atexit.register(_module.cache_clear)  # at the very end wasmtime could not let go of it
    engine = wasmtime.Engine()
    return engine, wasmtime.Module(engine, _text())


# ---- The module. Lanes are globals: a0–a3 and b0–b3 the state, m0–m3 and n0–n3 the multipliers.


def _text() -> str:
    lanes = "".join(f"(global ${lane}{i} (mut i64) (i64.const 0))" for lane in "abmn" for i in range(4))
    return f'(module (memory (export "memory") {DATA // _PAGE + 1}) {lanes} {_update()} {_hash()} {_RECORDS})'


def _get(lane: str) -> str:
    return f"(global.get ${lane})"


def _set(lane: str, value: str) -> str:
    return f"(global.set ${lane} {value})"


def _const(value: int) -> str:
    return f"(i64.const {value - (1 << 64) if value >> 63 else value})"


def _op(name: str, left: str, right: str | int) -> str:
    return f"(i64.{name} {left} {right if isinstance(right, str) else _const(right)})"


def _any(*values: str) -> str:
    return functools.reduce(lambda left, right: _op("or", left, right), values)


def _update() -> str:
    """Take in one packet of four lanes."""
    steps = []
    for i in range(4):
        a, b, m, n = (f"{lane}{i}" for lane in "abmn")
        steps += [
            _set(b, _op("add", _get(b), _op("add", _get(m), f"(local.get $l{i})"))),
            _set(
                m, _op("xor", _get(m), _op("mul", _op("and", _get(b), 0xFFFFFFFF), _op("shr_u", _get(a), 32)))
            ),
            _set(a, _op("add", _get(a), _get(n))),
            _set(
                n, _op("xor", _get(n), _op("mul", _op("and", _get(a), 0xFFFFFFFF), _op("shr_u", _get(b), 32)))
            ),
        ]
    for of, to in (("b", "a"), ("a", "b")):
        for i in (0, 2):
            steps += _zipper(f"{of}{i + 1}", f"{of}{i}", f"{to}{i + 1}", f"{to}{i}")
    lanes = " ".join(f"(param $l{i} i64)" for i in range(4))
    return f"(func $update {lanes} {' '.join(steps)})"


def _cross(low: str, high: str) -> str:
    """The lower half of one lane times the upper half of another."""
    return _op("mul", _op("and", _get(low), 0xFFFFFFFF), _op("shr_u", _get(high), 32))


def _zipper(high: str, low: str, to_high: str, to_low: str) -> list[str]:
    """Mix the bytes of two lanes, and add them to two others."""

    def part(lane: str, mask: int, shift: int) -> str:
        taken = _op("and", _get(lane), mask)
        return _op("shr_u", taken, shift) if shift >= 0 else _op("shl", taken, -shift)

    first = _any(
        part(low, 0xFF000000, 24),
        part(high, 0xFF00000000, 24),
        part(low, 0xFF0000000000, 16),
        part(high, 0xFF000000000000, 16),
        part(low, 0xFF0000, 0),
        part(low, 0xFF00, -32),
        part(high, 0xFF00000000000000, 8),
        part(low, 0xFF, -56),
    )
    second = _any(
        part(high, 0xFF000000, 24),
        part(low, 0xFF00000000, 24),
        part(high, 0xFF0000, 0),
        part(high, 0xFF0000000000, 16),
        part(high, 0xFF00, -24),
        part(low, 0xFF000000000000, 8),
        part(high, 0xFF, -48),
        part(low, 0xFF00000000000000, 0),
    )
    return [_set(to_low, _op("add", _get(to_low), first)), _set(to_high, _op("add", _get(to_high), second))]


def _packet(address: str) -> str:
    return "(call $update " + " ".join(f"(i64.load offset={8 * i} {address})" for i in range(4)) + ")"


def _hash() -> str:
    """The hash of `size` bytes at `p`."""
    begin, last = [], []
    for i in range(4):
        key = f"(i64.load (i32.const {8 * i}))"
        begin += [
            _set(f"m{i}", _const(_MUL0[i])),
            _set(f"n{i}", _const(_MUL1[i])),
            _set(f"a{i}", _op("xor", _const(_MUL0[i]), key)),
            _set(f"b{i}", _op("xor", _const(_MUL1[i]), _op("rotl", key, 32))),
        ]
        size = "(i64.extend_i32_u (local.get $n))"
        low = f"(i32.wrap_i64 {_get(f'b{i}')})"
        high = f"(i32.wrap_i64 {_op('shr_u', _get(f'b{i}'), 32)})"
        halves = [f"(i64.extend_i32_u (i32.rotl {half} (local.get $n)))" for half in (low, high)]
        last += [
            _set(f"a{i}", _op("add", _get(f"a{i}"), _op("add", _op("shl", size, 32), size))),
            _set(f"b{i}", _op("or", halves[0], _op("shl", halves[1], 32))),
        ]
    turned = " ".join(_op("rotl", _get(lane), 32) for lane in ("a2", "a3", "a0", "a1"))
    total = _op("add", _op("add", _get("a0"), _get("b0")), _op("add", _get("m0"), _get("n0")))
    return f"""
(func $hash (param $p i32) (param $size i32) (result i64)
  (local $end i32) (local $n i32) (local $odd i32)
  (local.set $n (i32.and (local.get $size) (i32.const 31)))
  (local.set $end (i32.add (local.get $p) (i32.sub (local.get $size) (local.get $n))))
  {" ".join(begin)}
  (block $done (loop $next
    (br_if $done (i32.ge_u (local.get $p) (local.get $end)))
    {_packet("(local.get $p)")}
    (local.set $p (i32.add (local.get $p) (i32.const 32)))
    (br $next)))
  (if (local.get $n) (then
    (memory.fill (i32.const 32) (i32.const 0) (i32.const 32))
    (local.set $odd (i32.and (local.get $n) (i32.const 3)))
    (memory.copy (i32.const 32) (local.get $p) (i32.and (local.get $n) (i32.const 28)))
    (if (i32.and (local.get $n) (i32.const 16)) (then
      (i32.store (i32.const 60) (i32.load (i32.sub (i32.add (local.get $p) (local.get $n)) (i32.const 4)))))
    (else (if (local.get $odd) (then
      (local.set $end (i32.add (local.get $p) (i32.and (local.get $n) (i32.const 28))))
      (i32.store8 (i32.const 48) (i32.load8_u (local.get $end)))
      (i32.store8 (i32.const 49)
        (i32.load8_u (i32.add (local.get $end) (i32.shr_u (local.get $odd) (i32.const 1)))))
      (i32.store8 (i32.const 50)
        (i32.load8_u (i32.sub (i32.add (local.get $end) (local.get $odd)) (i32.const 1))))))))
    {" ".join(last)}
    {_packet("(i32.const 32)")}))
  {" ".join([f"(call $update {turned})"] * 4)}
  {total})"""


_RECORDS = f"""
(func $size (param $p i32) (param $end i32) (result i32)
  ;; the size of the record at p; 0 if none fits there
  (local $size i32) (local $least i32)
  (if (i32.lt_u (i32.sub (local.get $end) (local.get $p)) (i32.const 30)) (then (return (i32.const 0))))
  (local.set $size (i32.and (i32.load (local.get $p)) (i32.const 0x7fffffff)))
  (local.set $least (i32.add (i32.const 30) (i32.load16_u offset=20 (local.get $p))))
  (if (i32.lt_s (i32.load (local.get $p)) (i32.const 0)) (then
    (local.set $least (i32.add (local.get $least) (i32.const 4)))))
  (if (i32.or (i32.lt_u (local.get $size) (local.get $least))
        (i32.or (i32.gt_u (local.get $size) (i32.sub (local.get $end) (local.get $p)))
                (i32.gt_u (local.get $size) (i32.const {RECORD_BYTES_MAX}))))
    (then (return (i32.const 0))))
  ;; the hash leaves the length of the headers out: where they end stands an empty line
  (if (i32.lt_s (i32.load (local.get $p)) (i32.const 0)) (then
    (local.set $least (i32.add (i32.const 22) (i32.load16_u offset=20 (local.get $p))))
    (local.set $least (i32.add (local.get $p) (local.get $least)))
    (local.set $end (i32.load (local.get $least)))
    (if (i32.or (i32.lt_u (local.get $end) (i32.const 4)) (i32.gt_u (local.get $end)
          (i32.sub (i32.add (local.get $p) (local.get $size)) (i32.add (local.get $least) (i32.const 12)))))
      (then (return (i32.const 0))))
    (if (i32.ne (i32.load (i32.add (local.get $least) (local.get $end))) (i32.const 0x0a0d0a0d))
      (then (return (i32.const 0))))))
  (local.get $size))
(func $sum (param $p i32) (param $size i32) (result i64)
  (local $subject i32) (local $skip i32) (local $rest i32)
  (local.set $subject (i32.load16_u offset=20 (local.get $p)))
  (local.set $skip (i32.shl (i32.shr_u (i32.load (local.get $p)) (i32.const 31)) (i32.const 2)))
  (local.set $rest
    (i32.sub (i32.sub (i32.sub (local.get $size) (i32.const 30)) (local.get $subject)) (local.get $skip)))
  (memory.copy (i32.const {ROOM}) (i32.add (local.get $p) (i32.const 4)) (i32.const 16))
  (memory.copy (i32.const {ROOM + 16}) (i32.add (local.get $p) (i32.const 22)) (local.get $subject))
  (memory.copy (i32.add (i32.const {ROOM + 16}) (local.get $subject))
    (i32.add (i32.add (i32.add (local.get $p) (i32.const 22)) (local.get $subject)) (local.get $skip))
    (local.get $rest))
  (call $hash (i32.const {ROOM}) (i32.add (i32.add (i32.const 16) (local.get $subject)) (local.get $rest))))
(func $whole (param $p i32) (param $end i32) (result i32)
  ;; the size of the record at p if it is whole, else 0
  (local $size i32)
  (local.set $size (call $size (local.get $p) (local.get $end)))
  (if (result i32) (i32.eqz (local.get $size)) (then (i32.const 0)) (else
    (if (result i32) (i64.eq (call $sum (local.get $p) (local.get $size))
                (i64.load (i32.sub (i32.add (local.get $p) (local.get $size)) (i32.const 8))))
      (then (local.get $size))
      (else (i32.const 0))))))
(func (export "scan") (param $p i32) (param $end i32) (param $seal i32) (result i32)
  (local $size i32)
  (loop $next
    (if (i32.lt_u (local.get $p) (local.get $end)) (then
      (if (local.get $seal)
        (then
          (local.set $size (call $size (local.get $p) (local.get $end)))
          (i64.store (i32.sub (i32.add (local.get $p) (local.get $size)) (i32.const 8))
            (call $sum (local.get $p) (local.get $size))))
        (else (local.set $size (call $whole (local.get $p) (local.get $end)))))
      (if (i32.eqz (local.get $size)) (then (return (local.get $p))))
      (local.set $p (i32.add (local.get $p) (local.get $size)))
      (br $next))))
  (local.get $p))
(func (export "find") (param $p i32) (param $end i32) (result i32)
  (local $size i32)
  (block $done (loop $next
    (br_if $done (i32.ge_u (local.get $p) (local.get $end)))
    (local.set $size (call $size (local.get $p) (local.get $end)))
    (if (local.get $size) (then
      (br_if $done (i64.eq (call $sum (local.get $p) (local.get $size))
        (i64.load (i32.sub (i32.add (local.get $p) (local.get $size)) (i32.const 8)))))))
    (local.set $p (i32.add (local.get $p) (i32.const 1)))
    (br $next)))
  (local.get $p))
(func $turn (param $p i32) (param $bit i32)
  (local.set $p (i32.add (local.get $p) (i32.shr_u (local.get $bit) (i32.const 3))))
  (i32.store8 (local.get $p) (i32.xor (i32.load8_u (local.get $p))
    (i32.shl (i32.const 1) (i32.and (local.get $bit) (i32.const 7))))))
(func (export "mend") (param $p i32) (param $end i32) (param $bits i32) (result i32)
  (local $bit i32) (local $size i32)
  (loop $next
    (call $turn (local.get $p) (local.get $bit))
    (local.set $size (call $size (local.get $p) (local.get $end)))
    (if (local.get $size) (then
      (if (i64.eq (call $sum (local.get $p) (local.get $size))
            (i64.load (i32.sub (i32.add (local.get $p) (local.get $size)) (i32.const 8))))
        (then (return (local.get $bit))))))
    (call $turn (local.get $p) (local.get $bit))
    (local.set $bit (i32.add (local.get $bit) (i32.const 1)))
    (br_if $next (i32.lt_u (local.get $bit) (local.get $bits))))
  (i32.const -1))
(func (export "hash_all") (param $size i32) (result i64)
  (call $hash (i32.const {DATA}) (local.get $size)))
(func (export "mend_all") (param $size i32) (param $expected i64) (result i32)
  (local $bit i32)
  (loop $next
    (call $turn (i32.const {DATA}) (local.get $bit))
    (if (i64.eq (call $hash (i32.const {DATA}) (local.get $size)) (local.get $expected))
      (then (return (local.get $bit))))
    (call $turn (i32.const {DATA}) (local.get $bit))
    (local.set $bit (i32.add (local.get $bit) (i32.const 1)))
    (br_if $next (i32.lt_u (local.get $bit) (i32.shl (local.get $size) (i32.const 3)))))
  (i32.const -1))"""
