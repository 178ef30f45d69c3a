;; A preview 2 command: greets on stdout, says how many arguments it has on stderr (as one digit), and
;; fails, exit code 1, if there is more than its own name.
(component
  (import "wasi:io/error@0.2.0" (instance $errors (export "error" (type (sub resource)))))
  (alias export $errors "error" (type $error))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (alias outer 1 $error (type $outer-error))
    (export "error" (type $error (eq $outer-error)))
    (export "output-stream" (type $stream (sub resource)))
    (type $stream-error-cases (variant (case "last-operation-failed" (own $error)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $stream-error-cases)))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $stream)) (param "contents" (list u8)) (result (result (error $stream-error)))))))
  (alias export $streams "output-stream" (type $stream))
  (import "wasi:cli/stdout@0.2.0" (instance $stdout
    (alias outer 1 $stream (type $outer-stream))
    (export "output-stream" (type $stream (eq $outer-stream)))
    (export "get-stdout" (func (result (own $stream))))))
  (import "wasi:cli/stderr@0.2.0" (instance $stderr
    (alias outer 1 $stream (type $outer-stream))
    (export "output-stream" (type $stream (eq $outer-stream)))
    (export "get-stderr" (func (result (own $stream))))))
  (import "wasi:cli/environment@0.2.0" (instance $environment
    (export "get-arguments" (func (result (list string))))))

  ;; Memory stands apart: the lowered imports need it before the program that calls them exists.
  (core module $memory-module
    (memory (export "memory") 2)
    (global $free (mut i32) (i32.const 1024))
    (func (export "realloc") (param $old i32) (param $old_size i32) (param $align i32) (param $size i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $free) (i32.const 7)) (i32.const -8)))
      (global.set $free (i32.add (local.get $at) (local.get $size)))
      (local.get $at)))
  (core instance $memory (instantiate $memory-module))

  (core func $write (canon lower (func $streams "[method]output-stream.blocking-write-and-flush")
    (memory (core memory $memory "memory")) (realloc (core func $memory "realloc"))))
  (core func $get-stdout (canon lower (func $stdout "get-stdout")))
  (core func $get-stderr (canon lower (func $stderr "get-stderr")))
  (core func $get-arguments (canon lower (func $environment "get-arguments")
    (memory (core memory $memory "memory")) (realloc (core func $memory "realloc"))))

  (core module $program-module
    (import "memory" "memory" (memory 1))
    (import "host" "write" (func $write (param i32 i32 i32 i32)))
    (import "host" "get-stdout" (func $get-stdout (result i32)))
    (import "host" "get-stderr" (func $get-stderr (result i32)))
    (import "host" "get-arguments" (func $get-arguments (param i32)))
    (data (i32.const 64) "hello from a component\n")
    (data (i32.const 128) "arguments: 0\n")
    (func (export "run") (result i32)
      (local $count i32)
      (call $write (call $get-stdout) (i32.const 64) (i32.const 23) (i32.const 0))
      (call $get-arguments (i32.const 16)) ;; the place of the list, then its length
      (local.set $count (i32.load (i32.const 20)))
      (i32.store8 (i32.const 139) (i32.add (i32.const 48) (local.get $count)))
      (call $write (call $get-stderr) (i32.const 128) (i32.const 13) (i32.const 0))
      (i32.gt_u (local.get $count) (i32.const 1))))
  (core instance $program (instantiate $program-module
    (with "memory" (instance $memory))
    (with "host" (instance
      (export "write" (func $write))
      (export "get-stdout" (func $get-stdout))
      (export "get-stderr" (func $get-stderr))
      (export "get-arguments" (func $get-arguments))))))

  (func $run (result (result)) (canon lift (core func $program "run")))
  (component $run-interface
    (import "run" (func $run (result (result))))
    (export "run" (func $run)))
  (instance $run-instance (instantiate $run-interface (with "run" (func $run))))
  (export "wasi:cli/run@0.2.0" (instance $run-instance)))
