"""What profiles run: one workflow that does what its input says, as text and assembled.

Its input is a list of words of JSON, each an action and what that needs:

    ["sleep 100"]           waits for so many ms, inside its slot up to 10 s
    ["count 100000000"]     computes: so many rounds of a multiplication that waits for the one before
    ["touch 100"]           takes so many MiB of memory, and writes to each page of it
    ["get http://…"]        asks for a page, and fails if that cannot be had
    []                      nothing: the lightest

An action is known by its first letter and its argument begins behind the first blank; nothing is escaped.
"""

from __future__ import annotations

import base64

ACTIONS = """\
(component
  (import "mvmci:workflow/host@0.1.0" (instance $host
    (type $a-header (record (field "name" string) (field "value" string)))
    (export "header" (type $header (eq $a-header)))
    (type $a-request (record
      (field "method" string) (field "url" string) (field "headers" (list $header)) (field "body" string)
      (field "timeout-ms" u32) (field "idempotent" bool)))
    (export "request" (type $request (eq $a-request)))
    (type $a-response (record
      (field "status" u16) (field "headers" (list $header)) (field "body" string) (field "base64" bool)))
    (export "response" (type $response (eq $a-response)))
    (type $an-error (variant
      (case "interrupted") (case "timed-out") (case "denied" string) (case "lost" string)
      (case "failed" string)))
    (export "effect-error" (type $error (eq $an-error)))
    (export "http" (func (param "request" $request) (result (result $response (error $error)))))
    (export "sleep" (func (param "ms" u64)))))

  ;; Memory stands apart: the lowered imports need it before the program that calls them exists.
  (core module $memory-module
    (memory (export "memory") 2)
    (global $free (export "free") (mut i32) (i32.const 1024)) ;; where the next string goes
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (global.set $free (i32.and (i32.add (global.get $free) (i32.const 7)) (i32.const -8)))
      (global.get $free)
      (global.set $free (i32.add (global.get $free) (local.get 3)))))
  (core instance $memory (instantiate $memory-module))
  (core func $http (canon lower (func $host "http")
    (memory (core memory $memory "memory")) (realloc (core func $memory "realloc"))))
  (core func $sleep (canon lower (func $host "sleep")))

  (core module $program-module
    (import "memory" "memory" (memory 2))
    (import "memory" "free" (global $free (mut i32)))
    (import "host" "http" (func $http (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32)))
    (import "host" "sleep" (func $sleep (param i64)))
    (data (i32.const 64) "GET")
    (data (i32.const 72) "null")
    (data (i32.const 80) "there is no memory")
    (data (i32.const 112) "no answer came in time")

    (func $count (param $rounds i64)
      (local $product i64)
      (loop $again
        (local.set $product (i64.add (i64.const 1442695040888963407)
          (i64.mul (local.get $product) (i64.const 6364136223846793005))))
        (local.set $rounds (i64.sub (local.get $rounds) (i64.const 1)))
        (br_if $again (i64.gt_s (local.get $rounds) (i64.const 0))))
      (i64.store (i32.const 32) (local.get $product)))

    (func $touch (param $pages i32) (result i32) ;; whether there was none
      (local $at i32) (local $end i32)
      (local.set $at (memory.grow (local.get $pages)))
      (if (i32.eq (local.get $at) (i32.const -1)) (then (return (i32.const 1))))
      (local.set $end (i32.shl (i32.add (local.get $at) (local.get $pages)) (i32.const 16)))
      (local.set $at (i32.shl (local.get $at) (i32.const 16)))
      (loop $again
        (if (i32.lt_u (local.get $at) (local.get $end))
          (then
            (i32.store8 (local.get $at) (i32.const 1))
            (local.set $at (i32.add (local.get $at) (i32.const 4096)))
            (br $again))))
      (i32.const 0))

    ;; result<response, effect-error> comes to 128: 0 is a response. What it says is forgotten with the next.
    (func $get (param $url i32) (param $size i32) (result i32) ;; whether it failed
      (local $free i32)
      (local.set $free (global.get $free))
      (call $http (i32.const 64) (i32.const 3) (local.get $url) (local.get $size)
        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 128))
      (if (result i32) (i32.load8_u (i32.const 128))
        (then (i32.const 1))
        (else (global.set $free (local.get $free)) (i32.const 0))))

    ;; result<string, string> at 0: a tag (0 is ok), then the string's place and length.
    (func $answer (param $tag i32) (param $at i32) (param $size i32) (result i32)
      (i32.store8 (i32.const 0) (local.get $tag))
      (i32.store (i32.const 4) (local.get $at))
      (i32.store (i32.const 8) (local.get $size))
      (i32.const 0))

    (func (export "run") (param $at i32) (param $size i32) (result i32)
      (local $end i32) (local $char i32) (local $action i32) (local $argument i32) (local $number i32)
      (local.set $end (i32.add (local.get $at) (local.get $size)))
      (loop $next
        (if (i32.ge_u (local.get $at) (local.get $end))
          (then (return (call $answer (i32.const 0) (i32.const 72) (i32.const 4)))))
        (local.set $char (i32.load8_u (local.get $at)))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (if (i32.ne (local.get $char) (i32.const 34)) (then (br $next))) ;; "
        (local.set $action (i32.load8_u (local.get $at)))
        (local.set $argument (i32.const 0))
        (local.set $number (i32.const 0))
        (loop $letter
          (local.set $char (i32.load8_u (local.get $at)))
          (local.set $at (i32.add (local.get $at) (i32.const 1)))
          (if (i32.and (i32.eq (local.get $char) (i32.const 32)) (i32.eqz (local.get $argument)))
            (then (local.set $argument (local.get $at))))
          (local.set $number (select
            (i32.add (i32.mul (local.get $number) (i32.const 10)) (i32.sub (local.get $char) (i32.const 48)))
            (local.get $number)
            (i32.lt_u (i32.sub (local.get $char) (i32.const 48)) (i32.const 10))))
          (if (i32.ne (local.get $char) (i32.const 34)) (then (br $letter))))
        (if (i32.eq (local.get $action) (i32.const 115)) ;; s
          (then (call $sleep (i64.extend_i32_u (local.get $number)))))
        (if (i32.eq (local.get $action) (i32.const 99)) ;; c
          (then (call $count (i64.extend_i32_u (local.get $number)))))
        (if (i32.eq (local.get $action) (i32.const 116)) ;; t
          (then
            (if (call $touch (i32.shl (local.get $number) (i32.const 4)))
              (then (return (call $answer (i32.const 1) (i32.const 80) (i32.const 18)))))))
        (if (i32.eq (local.get $action) (i32.const 103)) ;; g
          (then
            (if (call $get (local.get $argument)
                (i32.sub (i32.sub (local.get $at) (i32.const 1)) (local.get $argument)))
              (then
                ;; Of interrupted (0) and timed-out (1) there is nothing more to say.
                (if (i32.lt_u (i32.load8_u (i32.const 132)) (i32.const 2))
                  (then (return (call $answer (i32.const 1) (i32.const 112) (i32.const 22)))))
                (return (call $answer (i32.const 1)
                  (i32.load (i32.const 136)) (i32.load (i32.const 140))))))))
        (br $next))
      unreachable))
  (core instance $program (instantiate $program-module
    (with "memory" (instance $memory))
    (with "host" (instance (export "http" (func $http)) (export "sleep" (func $sleep))))))

  (func (export "run") (param "input" string) (result (result string (error string)))
    (canon lift (core func $program "run")
      (memory (core memory $memory "memory")) (realloc (core func $memory "realloc")))))
"""
# The text above, assembled.
ACTIONS_WASM = base64.b64decode(
    "AGFzbQ0AAQAHlAIBQg8BcgIEbmFtZXMFdmFsdWVzBAAGaGVhZGVyAwAAAXABAXIGBm1ldGhvZHMDdXJscwdoZWFkZXJzAgRib2R5cwp0"
    "aW1lb3V0LW1zeQppZGVtcG90ZW50fwQAB3JlcXVlc3QDAAMBcAEBcgQGc3RhdHVzewdoZWFkZXJzBQRib2R5cwZiYXNlNjR/BAAIcmVz"
    "cG9uc2UDAAYBcQULaW50ZXJydXB0ZWQAAAl0aW1lZC1vdXQAAAZkZW5pZWQBcwAEbG9zdAFzAAZmYWlsZWQBcwAEAAxlZmZlY3QtZXJy"
    "b3IDAAgBagEHAQkBQAEHcmVxdWVzdAQACgQABGh0dHABCwFAAQJtc3cBAAQABXNsZWVwAQwKHgEAGW12bWNpOndvcmtmbG93L2hvc3RA"
    "MC4xLjAFAAF7AGFzbQEAAAABCQFgBH9/f38BfwMCAQAFAwEAAgYHAX8BQYAICwcbAwZtZW1vcnkCAARmcmVlAwAHcmVhbGxvYwAAChcB"
    "FQAjAEEHakF4cSQAIwAjACADaiQACwAeBG5hbWUADg1tZW1vcnktbW9kdWxlBwcBAARmcmVlAgQBAAAABiADAQAABGh0dHAAAgEABm1l"
    "bW9yeQAAAQAHcmVhbGxvYwgJAQEAAAIDAAQABgoBAQAABXNsZWVwCAUBAQABAAGMBwBhc20BAAAAASUFYAt/f39/f39/f39/fwBgAX4A"
    "YAF/AX9gAn9/AX9gA39/fwF/AjoEBm1lbW9yeQZtZW1vcnkCAAIGbWVtb3J5BGZyZWUDfwEEaG9zdARodHRwAAAEaG9zdAVzbGVlcAAB"
    "AwYFAQIDBAMHBwEDcnVuAAYK1AMFNwEBfgNAQs+Cnrvv796CFCABQq3+1eTUhf2o2AB+fCEBIABCAX0hACAAQgBVDQALQSAgATcDAAtE"
    "AQJ/IABAACEBIAFBf0YEQEEBDwsgASAAakEQdCECIAFBEHQhAQNAIAEgAkkEQCABQQE6AAAgAUGAIGohAQwBCwtBAAs0AQF/IwAhAkHA"
    "AEEDIAAgAUEAQQBBAEEAQQBBAEGAARAAQYABLQAABH9BAQUgAiQAQQALCxkAQQAgADoAAEEEIAE2AgBBCCACNgIAQQALhQIBBX8gACAB"
    "aiECA0AgACACTwRAQQBByABBBBAFDwsgAC0AACEDIABBAWohACADQSJHBEAMAQsgAC0AACEEQQAhBUEAIQYDQCAALQAAIQMgAEEBaiEA"
    "IANBIEYgBUVxBEAgACEFCyAGQQpsIANBMGtqIAYgA0Ewa0EKSRshBiADQSJHBEAMAQsLIARB8wBGBEAgBq0QAQsgBEHjAEYEQCAGrRAC"
    "CyAEQfQARgRAIAZBBHQQAwRAQQFB0ABBEhAFDwsLIARB5wBGBEAgBSAAQQFrIAVrEAQEQEGEAS0AAEECSQRAQQFB8ABBFhAFDwtBAUGI"
    "ASgCAEGMASgCABAFDwsLDAALAAsLSAQAQcAACwNHRVQAQcgACwRudWxsAEHQAAsSdGhlcmUgaXMgbm8gbWVtb3J5AEHwAAsWbm8gYW5z"
    "d2VyIGNhbWUgaW4gdGltZQDsAQRuYW1lAA8OcHJvZ3JhbS1tb2R1bGUBKQYABGh0dHABBXNsZWVwAgVjb3VudAMFdG91Y2gEA2dldAUG"
    "YW5zd2VyAnsFAgIABnJvdW5kcwEHcHJvZHVjdAMDAAVwYWdlcwECYXQCA2VuZAQDAAN1cmwBBHNpemUCBGZyZWUFAwADdGFnAQJhdAIE"
    "c2l6ZQYHAAJhdAEEc2l6ZQIDZW5kAwRjaGFyBAZhY3Rpb24FCGFyZ3VtZW50BgZudW1iZXIDIwMCAQAFYWdhaW4DAQEFYWdhaW4GAgAE"
    "bmV4dAMGbGV0dGVyBwcBAARmcmVlAiUCAQIEaHR0cAABBXNsZWVwAAIAAQIGbWVtb3J5EgAEaG9zdBIBBxECagFzAXNAAQVpbnB1dHMA"
    "AQYgAwAAAQIDcnVuAAIBAAZtZW1vcnkAAAEAB3JlYWxsb2MICgEAAAMCAwEEBAILCQEAA3J1bgECAABlDmNvbXBvbmVudC1uYW1lARAA"
    "AAIBBGh0dHACBXNsZWVwASIAEQIADW1lbW9yeS1tb2R1bGUBDnByb2dyYW0tbW9kdWxlARQAEgIABm1lbW9yeQIHcHJvZ3JhbQEIBQEA"
    "BGhvc3Q="
)
