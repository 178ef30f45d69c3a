"""Programs of others under wasmtime alone and under mvmci: the same output, end and files.

CPython 3.12.0, QuickJS-ng 0.11.0 and the place-and-route tool nextpnr 0.7 always; with MVMCI_FOREIGN=all
in the environment also yosys 0.70 (66 MiB of WebAssembly) and esbuild 0.27.2 (compiled from Go), which
take minutes to compile. Each case also names how the program ends and something that it prints, so that
two sides that agree to fail are not taken for success.

One difference is meant: wasmtime's own `proc_exit` ends in an error for codes from 126 up, and a
command of ours may end with any byte.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from tests.foreign.conftest import Fetched
from tests.foreign.sides import Case, Sides

STAGES = 150
PASSED = "exit: 0"
ABORTED = "trap: wasm `unreachable` instruction executed"


@dataclass(frozen=True, kw_only=True)
class Program:
    """A file of what is fetched, and what of its output differs from run to run."""

    fetched: str
    file: str
    differs: bytes = rb"(?!)"


PYTHON = Program(fetched="interpreters", file="python.wasm")
QUICKJS = Program(fetched="interpreters", file="quickjs.wasm")
NEXTPNR = Program(
    fetched="nextpnr",
    file="nextpnr-gowin.wasm",
    differs=rb"\d+\.\d+s$|(?<=\|) +\d+\.\d+ +\d+\.\d+\|$",  # how long it took
)
YOSYS = Program(
    fetched="yosys",
    file="yosys.wasm",
    differs=rb"CPU: user .*|^Time spent: .*|^End of script\. Logfile hash: .*|\d+% \d+x .*|\(\d+ sec\)",
)
ESBUILD = Program(fetched="esbuild", file="esbuild.wasm", differs=rb"Done in \d+m?s")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a program. Files that are paths lie beside the program."""

    name: str
    program: Program
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    stdin: bytes | None = None
    files: tuple[tuple[str, bytes | Path], ...] = ()
    ended: str = PASSED
    prints: bytes = b""
    leaves: tuple[str, ...] = ()


GIVEN = """
import os, sys
print(sys.argv, sorted(os.environ.items()), os.getcwd(), sys.stdin.encoding, sys.platform)
print(len(sys.stdin.buffer.read()), [os.isatty(fd) for fd in range(3)], sys.flags.utf8_mode)
"""
FILES = """
import hashlib, json, os, pathlib, shutil, sqlite3, tempfile, zipfile
here = pathlib.Path("src")
sums = {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(here.rglob("*")) if p.is_file()}
pathlib.Path("report/näme").mkdir(parents=True)
pathlib.Path("report/näme/sums.json").write_text(json.dumps(sums, indent=1))
with open("log", "w+b") as log:
    log.write(b"0123456789" * 100_000); log.seek(500)
    log.truncate(700_000); log.seek(0, 2); log.write(b"end")
os.rename("log", "report/log")
with open("report/log", "ab") as log: log.write(b"!")
shutil.rmtree("src/gone"); os.remove("src/a.txt")
with sqlite3.connect("report/data.db") as db:
    db.execute("create table t (n integer primary key, s text)")
    db.executemany("insert into t (s) values (?)", [(f"row {n}",) for n in range(2000)])
print(db.execute("select count(*), max(s) from t").fetchone())
with zipfile.ZipFile("report/all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr(zipfile.ZipInfo("sums.json"), json.dumps(sums))
os.symlink("log", "report/link"); print(os.readlink("report/link"), os.stat("report/link").st_size)
os.link("report/log", "report/hard"); print(os.stat("report/log").st_nlink)
with tempfile.NamedTemporaryFile(dir="/tmp") as t: print(os.path.dirname(t.name), os.listdir("/tmp") != [])
print(sorted(os.listdir("/")), sorted(os.listdir("report")), sorted(os.scandir("src"), key=str))
"""
REFUSED = """
import os, socket, subprocess, time
def attempt(what, do):
    try: print(what, "worked:", do())
    except BaseException as error: print(what, type(error).__name__, getattr(error, "errno", None), error)
attempt("passwd", lambda: open("/etc/passwd").read())
attempt("above", lambda: open("../../../etc/passwd").read())
attempt("proc", lambda: open("/proc/self/environ").read())
os.symlink("../../../../etc/passwd", "leads-out")
attempt("link", lambda: open("leads-out").read())
attempt("absolute link", lambda: os.symlink("/etc/passwd", "absolute"))
attempt("rename out", lambda: os.rename("leads-out", "../out"))
attempt("link out", lambda: os.link("leads-out", "../../out"))
attempt("descriptors", lambda: [fd for fd in range(64) if not isinstance(fd_of(fd), str)])
attempt("socket", lambda: socket.socket())
attempt("program", lambda: subprocess.run(["true"]))
attempt("fork", lambda: os.fork())
attempt("kill", lambda: os.kill(1, 0))
attempt("directory", lambda: open("/").read())
attempt("into directory", lambda: os.mkdir("none/at/all"))
attempt("not empty", lambda: (os.mkdir("d"), open("d/f", "w").close(), os.rmdir("d")))
attempt("device", lambda: os.mkfifo("pipe"))
attempt("mode", lambda: os.chmod("d", 0o700))
attempt("wait", lambda: time.sleep(0.01))
"""
FD_OF = """
def fd_of(fd):
    import os
    try: return os.fstat(fd)
    except OSError as error: return str(error)
"""
OUTPUT = """
import sys
for n in range(20_000):
    sys.stdout.write(f"{n:08} out " + "x" * 80 + "\\n")
    sys.stderr.write(f"{n:08} err\\n")
"""
COMPUTE = """
import ast, decimal, json, math, random, re, statistics, struct, zlib
random.seed(7); values = [random.gauss(0, 1) for _ in range(20_000)]
print(math.fsum(values), statistics.stdev(values[:500]), math.sin(1e22), struct.pack("d", 0.1 + 0.2).hex())
decimal.getcontext().prec = 400; print(decimal.Decimal(2).sqrt())
print(zlib.crc32(json.dumps(values).encode()), len(re.findall(r"(?:-?0\\.(\\d)\\1)", json.dumps(values))))
print(2 ** 4000 % 10 ** 60, len(ast.dump(ast.parse("\\n".join(f"a{n} = {n} + 1" for n in range(2000))))))
"""
JS = """
import * as std from "qjs:std"; import * as os from "qjs:os";
const text = std.loadFile("data.json"); const data = JSON.parse(text);
const file = std.open("out/sorted.json", "w");
file.puts(JSON.stringify(data.sort((a, b) => a - b).map(n => n / 3))); file.close();
console.log(scriptArgs.join(), data.length, std.getenv("MODE"), std.in.getline(), os.readdir(".")[0].sort());
console.log([..."ÀÉ𝒳".normalize("NFD")].length, 0.1 + 0.2, 2n ** 200n);
console.log(/(?<y>\\d{4})/u.exec("in 2024").groups.y);
"""


def ring(stages: int) -> bytes:
    """A ring of flip-flops and look-up tables, as the netlist that a synthesiser would write."""
    numbers, cells = count(2), {}
    pad, clock, led = next(numbers), next(numbers), next(numbers)
    outputs = [next(numbers) for _ in range(stages)]

    def cell(name: str, kind: str, parameters: dict[str, str], **wires: int) -> None:
        directions = {port: "output" if port in "OFQ" else "input" for port in wires}
        connections = {port: [bit] for port, bit in wires.items()}
        cells[name] = {"type": kind, "parameters": parameters, "attributes": {}}
        cells[name] |= {"port_directions": directions, "connections": connections}

    cell("in", "IBUF", {}, I=pad, O=clock)
    for n, output in enumerate(outputs):
        between = next(numbers)
        cell(f"lut{n}", "LUT1", {"INIT": "10" if n else "01"}, I0=outputs[n - 1], F=between)
        cell(f"ff{n}", "DFF", {}, CLK=clock, D=between, Q=output)
    cell("out", "OBUF", {}, I=outputs[-1], O=led)
    ports = {"clk": {"direction": "input", "bits": [pad]}, "led": {"direction": "output", "bits": [led]}}
    top = {"attributes": {"top": "1"}, "ports": ports, "cells": cells, "netnames": {}}
    return json.dumps({"creator": "a test", "modules": {"top": top}}).encode()


def python(name: str, code: str, *args: str, **more: object) -> Run:
    """Python code as a script in the workspace."""
    files = (("main.py", code.encode()), *more.pop("files", ()))  # type: ignore[misc]
    return Run(name=f"python-{name}", program=PYTHON, args=("main.py", *args), files=files, **more)  # type: ignore[arg-type]


SOURCES = (
    ("src/a.txt", b"a\n"),
    ("src/b/b.bin", bytes(range(256)) * 999),
    ("src/gone/c", b"c"),
    ("src/empty", b""),
)
DEVICE = ("--device", "GW1N-LV1QN48C6/I5")
VERILOG = b"""
module top(input clk, input [15:0] a, b, output reg [31:0] q, output [7:0] leds);
  reg [31:0] sum = 0; reg [7:0] mem [0:255];
  always @(posedge clk) begin
    sum <= sum + a * b; q <= sum ^ (sum >> 3); mem[a[7:0]] <= b[7:0];
  end
  assign leds = mem[b[7:0]] ^ sum[7:0];
endmodule
"""
# Without its last step, ABC: as another program inside of this one, it ends the whole on both sides.
SYNTH = (
    "read_verilog top.v; hierarchy -top top; proc; opt; memory; opt; techmap; opt -full; stat; "
    "write_json out.json; write_blif out.blif; write_verilog out.v"
)
MODULES = (
    (
        "src/app.ts",
        b"import {a} from './a'; import d from './d.json'; enum E {X, Y}\nconsole.log(a, d.k, E.Y)\n",
    ),
    ("src/a.ts", b"export const a: number = 40 + 2; export const unused = 'not in the bundle'\n"),
    ("src/d.json", b'{"k": "v", "unused": 1}'),
)

RUNS = (
    python(
        "given",
        GIVEN,
        "--flag",
        "",
        "a b",
        "näme",
        env=(("A", "1"), ("B", "x=y z")),
        prints="'näme'".encode(),
        stdin=os.urandom(1 << 20),
    ),
    python(
        "files", FILES, files=SOURCES, prints=b"(2000, 'row 999')", leaves=("report/data.db", "report/hard")
    ),
    python("refused", FD_OF + REFUSED, prints=b"passwd FileNotFoundError 44"),
    python("output", OUTPUT, prints=b"00019999 out"),
    python("compute", COMPUTE, prints=b"1.41421356237309504880168872420969807856967187537694807317667973799"),
    python("no-stdin", "print(repr(input()))", ended="exit: 1"),
    python("exit", "import sys; print('bye'); sys.exit(97)", ended="exit: 97", prints=b"bye"),
    python("abort", "import os; print('bye', flush=True); os.abort()", ended=ABORTED, prints=b"bye"),
    Run(
        name="quickjs-files",
        program=QUICKJS,
        args=("--std", "-m", "main.mjs", "--", "one", "two"),
        env=(("MODE", "test"),),
        stdin=b"a line\nmore",
        files=(
            ("main.mjs", JS.encode()),
            ("data.json", json.dumps([*range(500, 0, -1)]).encode()),
            ("out/x", b""),
        ),
        prints=b"0.30000000000000004",
        leaves=("out/sorted.json",),
    ),
    Run(name="quickjs-throws", program=QUICKJS, args=("-e", "null.x"), ended="exit: 1"),
    Run(name="quickjs-exits", program=QUICKJS, args=("--std", "-e", "std.exit(9)"), ended="exit: 9"),
    Run(
        name="nextpnr-routes",
        program=NEXTPNR,
        args=(
            *DEVICE,
            "--json",
            "ring.json",
            "--write",
            "routed.json",
            "--report",
            "report.json",
            "--seed",
            "7",
        ),
        files=(("ring.json", ring(STAGES)), ("share", Path("share"))),
        leaves=("routed.json", "report.json"),
    ),
)
LARGE = (
    # A trap in it takes seconds on both sides: wasmtime reads its debug information.
    Run(
        name="nextpnr-refuses",
        program=NEXTPNR,
        args=(*DEVICE, "--json", "ring.json"),
        files=(("ring.json", b'{"modules": '), ("share", Path("share"))),
        ended=ABORTED,
    ),
    Run(
        name="yosys-synthesises",
        program=YOSYS,
        args=("-p", SYNTH),
        files=(("top.v", VERILOG), ("share", Path("share"))),
        prints=b"Printing statistics",
        leaves=("out.json", "out.blif", "out.v"),
    ),
    Run(name="yosys-refuses", program=YOSYS, args=("-p", "read_verilog none.v"), ended="exit: 1"),
    Run(
        name="esbuild-bundles",
        program=ESBUILD,
        args=(
            "src/app.ts",
            "--bundle",
            "--minify",
            "--sourcemap",
            "--outdir=out",
            "--metafile=out/meta.json",
        ),
        files=MODULES,
        leaves=("out/app.js", "out/app.js.map", "out/meta.json"),
    ),
    Run(
        name="esbuild-refuses",
        program=ESBUILD,
        args=("src/app.ts", "--bundle"),
        files=MODULES[:2],
        ended="exit: 1",
    ),
)
ALL = RUNS + LARGE if os.environ.get("MVMCI_FOREIGN") == "all" else RUNS


@pytest.mark.parametrize("run", ALL, ids=lambda run: run.name)
def test_a_program_of_others_behaves_as_under_wasmtime_alone(
    run: Run, fetched: Fetched, sides: Sides
) -> None:
    folder = fetched(run.program.fetched)
    files = {name: folder / data if isinstance(data, Path) else data for name, data in run.files}
    case = Case(module=folder / run.program.file, args=run.args, env=run.env, stdin=run.stdin, files=files)
    differs = re.compile(run.program.differs, re.MULTILINE)
    alone, under_mvmci = (
        outcome.normalised(lambda text: differs.sub(b"", text)) for outcome in sides.both(case)
    )
    assert under_mvmci == alone
    assert under_mvmci.ended == run.ended, under_mvmci.stderr.decode()
    assert run.prints in under_mvmci.stdout
    assert set(run.leaves) <= set(under_mvmci.files)


def test_a_code_that_wasmtime_refuses_is_a_programs_exit_code(fetched: Fetched, sides: Sides) -> None:
    case = Case(module=fetched("interpreters") / "python.wasm", args=("-c", "raise SystemExit(200)"))
    alone, under_mvmci = sides.both(case)
    assert alone.ended.startswith("trap: ")
    assert under_mvmci.ended == "exit: 200"
