;; A workflow with as many effects as its input says, a JSON number, that cost nothing themselves: each asks
;; for a program that no cluster allows. Its intent is written and synced, it is denied at once, and the
;; answer is written before anything else may follow.
(component
  (import "mvmci:workflow/host@0.1.0" (instance $host
    (type $a-header (record (field "name" string) (field "value" string)))
    (export "header" (type $header (eq $a-header)))
    (type $a-command (record
      (field "argv" (list string)) (field "env" (list $header)) (field "stdin" string)
      (field "timeout-ms" u32) (field "idempotent" bool)))
    (export "command" (type $command (eq $a-command)))
    (type $an-exit (record (field "code" s32) (field "stdout" string) (field "stderr" string)))
    (export "exit" (type $exit (eq $an-exit)))
    (type $an-error (variant
      (case "interrupted") (case "timed-out") (case "denied" string) (case "lost" string) (case "failed" string)))
    (export "effect-error" (type $error (eq $an-error)))
    (export "exec" (func (param "command" $command) (result (result $exit (error $error)))))))

  ;; Memory stands apart: the lowered import needs it before the program that calls it exists.
  (core module $memory-module
    (memory (export "memory") 1)
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 1024))) ;; the newest string
  (core instance $memory (instantiate $memory-module))
  (core func $exec (canon lower (func $host "exec")
    (memory (core memory $memory "memory")) (realloc (core func $memory "realloc"))))

  (core module $program-module
    (import "memory" "memory" (memory 1))
    (import "host" "exec" (func $exec (param i32 i32 i32 i32 i32 i32 i32 i32 i32)))
    (data (i32.const 64) "null")
    (data (i32.const 72) "nothing")
    (data (i32.const 80) "\48\00\00\00\07\00\00\00") ;; a list of one string
    ;; result<string, string> at 0: a tag (0 is ok), then the string's place and length.
    (func (export "run") (param $at i32) (param $size i32) (result i32)
      (local $left i32) (local $end i32)
      (local.set $end (i32.add (local.get $at) (local.get $size)))
      (loop $digit
        (if (i32.lt_u (local.get $at) (local.get $end))
          (then
            (local.set $left (i32.add
              (i32.mul (local.get $left) (i32.const 10))
              (i32.sub (i32.load8_u (local.get $at)) (i32.const 48))))
            (local.set $at (i32.add (local.get $at) (i32.const 1)))
            (br $digit))))
      (loop $effect
        (if (local.get $left)
          (then
            (call $exec
              (i32.const 80) (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) ;; argv, env, stdin
              (i32.const 1000) (i32.const 0) (i32.const 128)) ;; timeout-ms, idempotent; where the answer goes
            (local.set $left (i32.sub (local.get $left) (i32.const 1)))
            (br $effect))))
      (i32.store (i32.const 0) (i32.const 0))
      (i32.store (i32.const 4) (i32.const 64))
      (i32.store (i32.const 8) (i32.const 4))
      (i32.const 0)))
  (core instance $program (instantiate $program-module
    (with "memory" (instance $memory))
    (with "host" (instance (export "exec" (func $exec))))))

  (func (export "run") (param "input" string) (result (result string (error string)))
    (canon lift (core func $program "run")
      (memory (core memory $memory "memory")) (realloc (core func $memory "realloc")))))
