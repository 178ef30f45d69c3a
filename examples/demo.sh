#!/bin/sh
# The main job, in a minute: a WASI program on a directory, then a workflow that is killed and goes on.
# Run it with `./just demo`, which builds what it needs.
set -eu
cd -- "$(dirname -- "$0")/.."
mvmci="${MVMCI_ZIPAPP:-dist/mvmci.pyz}"
here=$(mktemp -d)
export MVMCI_STATE="$here/state"
server=
flow=

finish() {
    code=$?
    for pid in $server $flow; do kill "$pid" 2>/dev/null || true; done
    rm -rf "$here"
    exit "$code"
}
trap finish EXIT INT TERM

step() { printf '\n== %s\n' "$*"; }
quoted() {
    .venv/bin/python -c 'import shlex, sys; print("$ mvmci", shlex.join(sys.argv[1:]))' "$@"
}
show() {
    quoted "$@"
    "$mvmci" "$@"
}

step "1. A WASI program on a copy of a directory; it leaves an artifact"
show run dist/examples/c-command.wasm --id count --dir examples --artifact 'report/*' -- --top 3
show artifacts count --local --output "$here/out"
head -c 200 "$here/out/report/summary.json"
echo

step "2. A workflow with HTTP calls, a native program and sleeps; its process is killed with -9 in the middle"
mkfifo "$here/port" "$here/said"
.venv/bin/python examples/demo_server.py >"$here/port" &
server=$!
read -r port <"$here/port"
url="http://127.0.0.1:$port"
set -- run dist/examples/python-workflow.wasm --id release --dir examples/c-command \
    --allow-http "$url/*" --allow-exec cksum \
    --input "{\"url\": \"$url\", \"files\": [\"count.c\", \"README.md\"], \"pause_ms\": 300}"
quoted "$@"
"$mvmci" "$@" 2>"$here/said" &
flow=$!
while read -r line; do
    echo "$line"
    case $line in *'checked count.c'*) kill -9 "$flow" && break ;; esac
done <"$here/said"
wait "$flow" 2>/dev/null || true
flow=
echo "-- kill -9 --"
show status release --local

step "3. The same command again: it goes on from its journal"
show "$@"

step "4. Every effect was done once"
.venv/bin/python examples/demo_server.py --counts "$url"
show history release --local

step "5. And it is what its journal says"
show replay release --local
