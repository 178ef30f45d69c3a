#!/bin/sh
# The main job, in a minute: a cluster from one file, a WASI program on it, then a workflow whose worker is
# killed in the middle and which goes on elsewhere. Run it with `./just demo`, which builds what it needs.
set -eu
cd -- "$(dirname -- "$0")/.."
mvmci="${MVMCI_ZIPAPP:-dist/mvmci.pyz}"
here=$(mktemp -d)
export MVMCI_STATE="$here/state"
server=
follower=
drainer=

finish() {
    code=$?
    for pid in $server $follower $drainer; do kill "$pid" 2>/dev/null || true; done
    "$mvmci" down --grace 1s >/dev/null 2>&1 || true
    rm -rf "$here"
    exit "$code"
}
trap finish EXIT INT TERM

step() { printf '\n== %s\n' "$*"; }
show() {
    .venv/bin/python -c 'import shlex, sys; print("$ mvmci", shlex.join(sys.argv[1:]))' "$@"
    "$mvmci" "$@"
}
# The value of a field: `field worker` of a job's status, `field pid worker-1` of a unit.
field() {
    .venv/bin/python -c '
import json, sys
told, key, *unit = json.load(sys.stdin), *sys.argv[1:]
print(next(one for one in told["units"] if one["name"] == unit[0])[key] if unit else told[key])' "$@"
}

mkfifo "$here/said"
.venv/bin/python examples/demo_server.py --hold /builds/42 >"$here/said" &
server=$!
exec 3<"$here/said"
read -r port <&3
url="http://127.0.0.1:$port"

step "1. A cluster of three workers, from one file"
cat >"$here/cluster.yaml" <<END
cluster: demo
access: per-worker
workers: {count: 3, slots: 2}
allow: {http: ["$url/*"], exec: [cksum]}
END
cat "$here/cluster.yaml"
show up "$here/cluster.yaml" --detach

step "2. A WASI program on a copy of a directory; it leaves an artifact"
show submit dist/examples/c-command.wasm --id count --dir examples --artifact 'report/*' --wait -- --top 3
show artifacts count --output "$here/out"
head -c 200 "$here/out/report/summary.json"
echo

step "3. A workflow with HTTP calls, a native program and sleeps; its worker is killed with -9 in its last request"
show submit dist/examples/python-workflow.wasm --id release --dir examples/c-command \
    --input "{\"url\": \"$url\", \"files\": [\"count.c\", \"README.md\"], \"pause_ms\": 300}"
"$mvmci" logs release -f &
follower=$!
read -r asked <&3 # the server answers this request when it is told that the worker is dead
echo "-- the server was asked for $asked, and does not answer --"
worker=$("$mvmci" status release --json | field worker)
show drain "$worker" & # it is started again at once, and could go on with its job as well as any other
drainer=$!
until [ "$("$mvmci" ps --json | field state "$worker")" = draining ]; do sleep 0.1; done
kill -9 "$("$mvmci" ps --json | field pid "$worker")"
echo "-- kill -9 of $worker --"
wait "$drainer"
drainer=
.venv/bin/python examples/demo_server.py --release "$url"
wait "$follower"
follower=
show wait release
show status release

step "4. Every effect was done once"
show history release
"$mvmci" history release --json | .venv/bin/python examples/demo_proof.py "$worker" "$url"

step "5. And it is what its journal says"
show replay release
show ps
show down
