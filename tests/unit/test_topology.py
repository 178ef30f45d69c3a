"""The cluster file: a text and what is wrong with it, as `line:column message`."""

from __future__ import annotations

import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from mvmci.cluster import topology
from mvmci.cluster.deployment import workers
from mvmci.config import strict_yaml
from mvmci.config.reader import Reading
from tests.harness.places import ROOT

SHIPPED = ROOT / "topologies"
ACCESSES = ("per-worker", "peer", "pool", "shared")
SMALLEST = "cluster: demo\nworkers: {count: 3}\n"
HOSTS = "hosts: {a: {address: 10.0.0.5, user: ci}, b: {address: 10.0.0.6}, gone: {state: absent}}\n"


def problems(text: str | bytes) -> list[str]:
    with pytest.raises(topology.BadTopology) as caught:
        topology.read_topology(text, name="pool.yaml", accesses=ACCESSES)
    assert all(problem.where.startswith("pool.yaml:") for problem in caught.value.problems)
    return [
        f"{problem.where.removeprefix('pool.yaml:')} {problem.message}" for problem in caught.value.problems
    ]


def hints(text: str) -> list[str | None]:
    with pytest.raises(topology.BadTopology) as caught:
        topology.read_topology(text, name="pool.yaml", accesses=ACCESSES)
    return [problem.hint for problem in caught.value.problems]


def test_the_smallest_file_gets_a_default_for_all_else() -> None:
    found = topology.read_topology(SMALLEST, name="pool.yaml")
    assert found == topology.Topology(cluster="demo", workers=topology.WorkersSection(count=3))
    assert (found.access, found.runtime, found.durability, found.isolation) == (
        "per-worker",
        "local",
        "strict",
        "reuse",
    )
    assert (found.min_isolation, found.workers.queues, found.executors) == ("process", ("default",), None)
    assert (found.retain.jobs_ms, found.retain.logs_ms) == (7 * 86_400_000, 2 * 86_400_000)
    assert found.broker.store_bytes == 10 << 30


def test_every_key_is_read() -> None:
    text = """
        cluster: demo
        access: pool
        runtime: compose
        hosts:     {a: {address: 10.0.0.5, user: ci}, b: {address: "::1", port: 2222}, c: {state: absent}}
        broker:    {hosts: [a], listen: "10.0.0.5:4222", store: 2GiB}
        control_plane: {hosts: [a]}
        executors: {hosts: [a, b], count: 2, slots: 4, url: "http://balancer:27288"}
        workers:   {hosts: [b], count: 3, slots: 4, queues: [default, big], labels: {arch: amd64, spot: yes}}
        allow:     {http: ["https://api.example.com/*", "*"], exec: [git, /usr/bin/make]}
        retain:    {jobs: 30, logs: 1.5h}
        durability: relaxed
        min_isolation: confined
        isolation: per-job
        plugin: ./mine.py
    """
    found = topology.read_topology(text, name="pool.yaml")
    assert found == topology.Topology(
        cluster="demo",
        access="pool",
        plugin="./mine.py",
        runtime="compose",
        hosts={
            "a": topology.HostSection(address="10.0.0.5", user="ci"),
            "b": topology.HostSection(address="::1", port=2222),
            "c": topology.HostSection(state="absent"),
        },
        broker=topology.BrokerSection(hosts=("a",), listen="10.0.0.5:4222", store="2GiB"),
        control_plane=topology.ControlPlaneSection(hosts=("a",)),
        executors=topology.ExecutorsSection(hosts=("a", "b"), count=2, slots=4, url="http://balancer:27288"),
        workers=topology.WorkersSection(
            hosts=("b",), count=3, slots=4, queues=("default", "big"), labels={"arch": "amd64", "spot": "yes"}
        ),
        allow=topology.AllowSection(http=("https://api.example.com/*", "*"), exec=("git", "/usr/bin/make")),
        retain=topology.RetainSection(jobs=30, logs="1.5h"),
        durability="relaxed",
        min_isolation="confined",
        isolation="per-job",
    )
    assert (found.retain.jobs_ms, found.retain.logs_ms, found.broker.store_bytes) == (
        30_000,
        5_400_000,
        2 << 30,
    )


def test_workers_are_one_group_or_several() -> None:
    text = """
        cluster: demo
        hosts: {a: {}, b: {}}
        workers:
          - {count: 2, queues: [default, big]}
          - {name: gpu, count: 1, hosts: [b], slots: 1, queues: [gpu, big], labels: {gpu: a100}}
    """
    found = topology.read_topology(text, name="a.yaml")
    assert found.queues == ("default", "big", "gpu")
    assert [(one.name, one.host, *one.options) for one in workers(found)] == [
        ("worker-1", "a", "--queue=default", "--queue=big"),
        ("worker-2", "b", "--queue=default", "--queue=big"),
        ("gpu-1", "b", "--slots=1", "--queue=gpu", "--queue=big", "--label=gpu=a100"),
    ]
    alone = topology.read_topology("cluster: demo\nworkers: {name: big, count: 1}\n", name="a.yaml")
    assert [one.name for one in workers(alone)] == ["big-1"]


@pytest.mark.parametrize(
    ("listen", "address", "port"),
    [
        ("0.0.0.0", "0.0.0.0", None),
        ("10.0.0.5:4222", "10.0.0.5", 4222),
        ('"[::]"', "::", None),
        ('"[fe80::1]:4222"', "fe80::1", 4222),
        ("ci.example.com", "ci.example.com", None),
    ],
)
def test_a_broker_listens_at_an_address_with_a_port_or_without(
    listen: str, address: str, port: int | None
) -> None:
    broker = topology.read_topology(SMALLEST + f"broker: {{listen: {listen}}}\n", name="a.yaml").broker
    assert (broker.address, broker.port) == (address, port)


def test_a_broker_that_says_nothing_listens_on_the_loopback_at_any_port() -> None:
    assert (topology.BrokerSection().address, topology.BrokerSection().port) == (None, None)


@pytest.mark.parametrize("access", ACCESSES)
def test_the_files_that_ship_are_good_and_local(access: str) -> None:
    file = SHIPPED / f"{access}.yaml"
    found = topology.read_topology(file.read_bytes(), name=file.name)
    assert (found.access, found.runtime) == (access, "local")


def test_an_access_is_any_that_is_installed_and_takes_what_executors_it_likes() -> None:
    text = SMALLEST + "access: ring\nexecutors: {count: 3, url: 'http://x'}\n"
    assert topology.read_topology(text, name="a.yaml", accesses=("pool", "ring")).access == "ring"
    assert topology.read_topology(text, name="a.yaml").access == "ring"  # who only reads it need not have it


@pytest.mark.parametrize(
    ("more", "access"), [("", "plugin"), ("access: ring\n", "ring"), ("access: peer\n", "peer")]
)
def test_with_a_plugin_the_access_is_only_a_name(more: str, access: str) -> None:
    text = SMALLEST + "plugin: mine.py\nexecutors: {count: 2}\n" + more
    found = topology.read_topology(text, name="a.yaml", accesses=ACCESSES)
    assert (found.access, found.plugin) == (access, "mine.py")


YAML = [
    ("", ["1:1 the file is empty"]),
    ("# nothing\n", ["1:1 the file is empty"]),
    ("[a", ["1:3 this is not YAML: expected ',' or ']', but got '<stream end>'"]),
    ("a: b: c", ["1:5 this is not YAML: mapping values are not allowed here"]),
    ("a:\n\tb: 1", ["2:1 this is not YAML: found character '\\t' that cannot start any token"]),
    ('cluster: "\\UFFFFFFFF"', ["1:13 this is not YAML: a number in it is out of bounds"]),
    ("cluster: \x00", ["1:10 the file has a character that YAML forbids"]),
    (b"a: b\nc: \xff", ["2:4 the file is not UTF-8"]),
    (SMALLEST + "---\n" + SMALLEST, ["3:1 a second document begins here"]),
    (SMALLEST + "cluster: again\n", ["3:1 `cluster` is given twice, first at line 1"]),
    ("cluster: demo\nworkers: &w {count: 3}\n", ["2:10 `&w` is an anchor"]),
    ("cluster: &x demo\nworkers: *x\n", ["1:10 `&x` is an anchor", "2:10 `*x` is an alias"]),
    (
        "cluster: !!str demo\nworkers: !x {count: 3}\n",
        ["1:10 `tag:yaml.org,2002:str` is a tag", "2:10 `!x` is a tag"],
    ),
    (SMALLEST + "<<: {access: peer}\n", ["3:1 `<<` is a merge key"]),
    (
        SMALLEST + "1: x\n[a]: y\n~: z\n",
        [
            "3:1 a key must be text, not `1`",
            "4:1 a key must be text, not a list",
            "5:1 a key must be text, not nothing",
        ],
    ),
    ('cluster: "de\\nmo"\nworkers: {}\n', ["1:10 this text has a line break or a control character"]),
    ("[" * 100, ["1:14 values are nested more than 12 deep here"]),
    ("- a\n" * 30_000, ["20000:3 the file has more than 20,000 values"]),
    ("a" * (1 << 20) + "a", ["1:1 the file has more than the 1,048,576 bytes that it may have"]),
    ("- a", ["1:1 the file must be a mapping, not a list"]),
    ("demo", ["1:1 the file must be a mapping, not `demo`"]),
]

SHAPES = [
    ("cluster: demo\n", ["1:1 there is no `workers`"]),
    ("workers: {count: 1}\n", ["1:1 there is no `cluster`"]),
    ("cluster: demo\nworkrs: {count: 3}\n", ["2:1 unknown key `workrs`"]),
    ("cluster: demo\nworkers: {cout: 3}\n", ["2:11 unknown key `cout` in `workers`"]),
    ("cluster: demo\nworkers:\n", ["2:9 `workers` must be a mapping, not nothing"]),
    ("cluster: demo\nworkers: 3\n", ["2:10 `workers` must be a mapping, not `3`"]),
    (
        "cluster: Demo\nworkers: {}\n",
        ["1:10 `cluster` must be a name of at most 63 small letters, digits and dashes, not `Demo`"],
    ),
    (
        "cluster: true\nworkers: {}\n",
        ["1:10 `cluster` must be a name of at most 63 small letters, digits and dashes, not `true`"],
    ),
    (SMALLEST + "access: pol\n", ["3:9 `access` must be one of per-worker, peer, pool, shared, not `pol`"]),
    (
        SMALLEST + "access: [pool]\n",
        ["3:9 `access` must be the name of an access, for example pool, not a list"],
    ),
    (
        "cluster: d\nworkers:\n  count: 0\n",
        ["3:10 `workers.count` must be a whole number from 1 to 10000, not `0`"],
    ),
    (
        "cluster: d\nworkers:\n  count: 1.5\n",
        ["3:10 `workers.count` must be a whole number from 1 to 10000, not `1.5`"],
    ),
    (
        "cluster: d\nworkers:\n  count: '3'\n",
        ["3:10 `workers.count` must be a whole number from 1 to 10000, not `3`"],
    ),
    (
        "cluster: d\nworkers: {queues: []}\n",
        ["2:19 `workers.queues` must be a list of 1 to 100 queues, not an empty list"],
    ),
    (
        "cluster: d\nworkers: {queues: big}\n",
        ["2:19 `workers.queues` must be a list of 1 to 100 queues, not `big`"],
    ),
    (
        "cluster: d\nworkers: {queues: [a, B]}\n",
        ["2:23 `workers.queues[1]` must be a name of at most 63 small letters, digits and dashes, not `B`"],
    ),
    ("cluster: d\nworkers: {labels: {arch: 64}}\n", ["2:26 `workers.labels.arch` must be text, not `64`"]),
    (
        SMALLEST + "hosts: {A: {}}\n",
        ["3:9 `hosts` must be a name of at most 63 small letters, digits and dashes, not `A`"],
    ),
    (
        SMALLEST + "hosts: {a: {port: 0, state: gone}}\n",
        [
            "3:19 `hosts.a.port` must be a port from 1 to 65535, not `0`",
            "3:29 `hosts.a.state` must be one of present, absent, lost, not `gone`",
        ],
    ),
    (
        SMALLEST + "hosts: {a: {address: -oProxyCommand=x}}\n",
        ["3:22 `hosts.a.address` must be a host name or an IP address, not `-oProxyCommand=x`"],
    ),
    (
        SMALLEST + "broker: {url: 'tls://me:secret@host'}\n",
        [
            "3:15 `broker.url` must be a URL that begins with tls:// or nats:// and holds no password, not `tls://me:secret@host`"
        ],
    ),
    (
        SMALLEST + "broker: {listen: '::1', credentials: ''}\n",
        [
            "3:18 `broker.listen` must be an address, as 0.0.0.0 or 10.0.0.5:4222, not `::1`",
            "3:38 `broker.credentials` must be the path of a file, not ``",
        ],
    ),
    (
        SMALLEST + "retain: {jobs: 1w, logs: 9999d}\n",
        ["3:16 `retain.jobs` must be a duration: seconds, or a number with ms, s, m, h or d, not `1w`"],
    ),
    (
        SMALLEST + "allow: {http: [example.com], exec: [bin/sh]}\n",
        [
            "3:16 allow: http: 'example.com': a URL starts with http:// or https://",
            "3:37 allow: exec: 'bin/sh' is a relative path",
        ],
    ),
]

CROSS = [
    (SMALLEST + "access: pool\n", ["3:9 access `pool` needs executors"]),
    (
        SMALLEST + "executors: {count: 2}\n",
        ["3:12 access `per-worker` has no executors: each worker has its engine inside"],
    ),
    (SMALLEST + "access: peer\nexecutors: {count: 2}\n", ["4:20 access `peer` has one executor"]),
    (SMALLEST + "access: shared\nexecutors: {url: 'http://x'}\n", ["4:18 access `shared` takes no URL"]),
    (
        SMALLEST + "access: shared\nexecutors: {balancer: haproxy}\n",
        ["4:23 access `shared` takes no balancer"],
    ),
    (
        SMALLEST + "access: pool\nexecutors: {balancer: haproxy, url: 'http://x'}\n",
        ["4:23 `executors.balancer` and `executors.url` exclude each other"],
    ),
    (
        SMALLEST + "access: pool\nexecutors: {balancer: nginx}\n",
        ["4:23 `executors.balancer` must be one of haproxy, not `nginx`"],
    ),
    (SMALLEST + "runtime: ssh\n", ["3:10 runtime ssh needs hosts"]),
    (
        SMALLEST + "hosts: {a: {jump: b}, b: {jump: c}, c: {jump: b}}\n",
        ["3:33 the jumps go in a circle: b → c → b", "3:47 the jumps go in a circle: c → b → c"],
    ),
    (
        SMALLEST + "hosts: {a: {jump: 'x@b:70000'}}\n",
        ["3:19 the port of `x@b:70000` must be from 1 to 65535"],
    ),
    (
        SMALLEST + "hosts: {a: {host_key: AAAA}}\n",
        [
            "3:23 `hosts.a.host_key` must be a host's public key, as `ssh-keyscan` prints it: "
            "ssh-ed25519 AAAA…, not `AAAA`"
        ],
    ),
    (SMALLEST + "hosts: {a: {state: absent}}\n", ["3:8 every host is absent"]),
    (
        SMALLEST + "hosts: {a: {jump: b}, b: {state: lost}, c: {jump: b, state: lost}}\n",
        ["3:19 the jump leads over host `b`, which is lost"],
    ),
    (
        SMALLEST + "hosts: {a: {}, b: {state: lost}}\nbroker: {hosts: [b]}\n",
        ["4:18 host `b` is lost"],
    ),
    (
        "cluster: d\nworkers: []\n",
        ["2:10 `workers` must be a list of 1 to 100 groups of workers, not an empty list"],
    ),
    (
        HOSTS + "cluster: d\nworkers: [{}, {hosts: [x], queues: [q, q]}, {name: broker, cuont: 1}]\n",
        ["3:60 unknown key `cuont` in `workers[2]`"],
    ),
    (
        HOSTS + "cluster: d\nworkers: [{}, {hosts: [x], queues: [q, q]}, {name: broker}]\n",
        [
            "3:15 two groups of workers have the name `worker`",
            "3:24 there is no host `x`",
            "3:40 queue `q` is listed twice",
            "3:52 `broker` is the name of another unit",
        ],
    ),
    (
        HOSTS + "cluster: d\nworkers: {hosts: [a, c, gone, a]}\n",
        ["3:22 there is no host `c`", "3:25 host `gone` is absent", "3:31 host `a` is listed twice"],
    ),
    (
        HOSTS + SMALLEST + "broker: {hosts: [x]}\ncontrol_plane: {hosts: [y]}\n",
        ["4:18 there is no host `x`", "5:25 there is no host `y`"],
    ),
    (
        HOSTS + SMALLEST + "broker: {hosts: [a, b]}\n",
        ["4:17 a replicated broker is not in this version"],
    ),
    (
        HOSTS + SMALLEST + "broker: {hosts: [a], url: 'tls://x'}\n",
        ["4:17 `broker.hosts` and `broker.url` exclude each other"],
    ),
    (
        SMALLEST + "broker: {url: 'tls://x', advertise: a}\n",
        ["3:37 `broker.advertise` and `broker.url` exclude each other"],
    ),
    (
        SMALLEST + "broker: {advertise: ci.example.com}\n",
        ["3:21 `broker.advertise` goes with `broker.listen`"],
    ),
    (
        SMALLEST + "broker: {listen: 0.0.0.0, advertise: [ci, 'ci:99999', 'a b']}\n",
        ["3:55 `broker.advertise[2]` must be an address, as 0.0.0.0 or 10.0.0.5:4222, not `a b`"],
    ),
    (
        SMALLEST + "broker: {listen: 0.0.0.0, advertise: [ci, 'ci:99999']}\n",
        ["3:38 the port of `ci:99999` must be from 1 to 65535"],
    ),
    (
        SMALLEST + "broker: {listen: 0.0.0.0, advertise: 'a b'}\n",
        ["3:38 `broker.advertise` must be an address, as 0.0.0.0 or 10.0.0.5:4222, not `a b`"],
    ),
    (
        SMALLEST + "broker: {credentials: me.creds}\n",
        ["3:23 `broker.credentials` goes with `broker.url`"],
    ),
    (
        SMALLEST + "broker: {listen: 'x:70000', store: 1MiB}\n",
        ["3:18 the port of `broker.listen` must be from 1 to 65535", "3:36 `1MiB` is out of bounds"],
    ),
    (
        SMALLEST + "retain: {jobs: 9999d, logs: -1}\n",
        ["3:16 `9999d` is out of bounds", "3:29 `-1` is not a duration"],
    ),
    ("cluster: d\nworkers: {queues: [a, a]}\n", ["2:23 queue `a` is listed twice"]),
]


@pytest.mark.parametrize(
    ("text", "expected"), [*YAML, *SHAPES, *CROSS], ids=range(len(YAML + SHAPES + CROSS))
)
def test_what_is_wrong_is_said_with_its_line_and_column(text: str | bytes, expected: list[str]) -> None:
    assert problems(text) == expected


def test_all_errors_of_a_file_are_reported_at_once() -> None:
    text = (
        "cluster: Demo\nworkers: {count: none, hosts: [x]}\nacess: peer\n"
        "broker: {hosts: [y]}\nretain: {logs: 9999d}\n"
    )
    assert [line.split()[0] for line in problems(text)] == ["1:10", "2:18", "3:1", "4:18", "5:16"]


def test_a_broken_section_makes_no_errors_elsewhere() -> None:
    # The host list cannot be read, so nobody can say that `a` is not in it.
    assert len(problems("cluster: d\nhosts: [a]\nworkers: {hosts: [a]}\n")) == 1
    assert len(problems("cluster: d\naccess: pool\nexecutor: {count: 2}\nworkers: {}\n")) == 1


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("cluster: d\nworkrs: {}\n", "Did you mean `workers`?"),
        (SMALLEST + "zzz: blue\n", "Known keys: cluster, access, "),
        (SMALLEST + "access: pol\n", "Did you mean `pool`?"),
        ("cluster: d\nworkers: {queues: big}\n", "Write a list: [big]."),
        ("cluster: d\nworkers: {labels: {arch: 64}}\n", 'Put it in quotes: "64".'),
        ("cluster: d\nworkers: {count: '3'}\n", "Write it without quotes."),
        ("cluster: d\nhosts: {alpha: {}}\nworkers: {hosts: [alhpa]}\n", "Did you mean `alpha`?"),
        ("cluster: d\n", "Add workers: {count: 3}."),
    ],
)
def test_a_hint_says_what_to_write_instead(text: str, hint: str) -> None:
    assert str(hints(text)[0]).startswith(hint)


def test_the_error_as_printed_holds_every_problem_and_hint_in_order() -> None:
    with pytest.raises(topology.BadTopology) as caught:
        topology.read_topology("cluster: d\nworkrs: {}\naccess: pol\n", name="a.yaml", accesses=ACCESSES)
    assert caught.value.message.splitlines() == [
        "a.yaml:2:1: unknown key `workrs`",
        "hint: Did you mean `workers`?",
        "a.yaml:3:9: `access` must be one of per-worker, peer, pool, shared, not `pol`",
    ]
    assert (caught.value.hint, caught.value.exit_code) == ("Did you mean `pool`?", 2)


def test_a_file_of_errors_prints_a_bounded_number() -> None:
    text = SMALLEST + "".join(f"key{n}: 1\n" for n in range(200))
    with pytest.raises(topology.BadTopology) as caught:
        topology.read_topology(text, name="a.yaml")
    assert len(caught.value.problems) == 200
    assert caught.value.message.count("unknown key") == topology.PROBLEMS_SHOWN_MAX
    assert caught.value.message.startswith("200 problems, of which the first 50 are:")


def test_more_hosts_than_the_limit_are_refused() -> None:
    text = SMALLEST + "hosts:\n" + "".join(f"  h{n}: {{}}\n" for n in range(1001))
    assert problems(text) == ["4:3 `hosts` must be a mapping from names to at most 1000 hosts, not a mapping"]


def test_a_message_never_carries_what_a_terminal_would_obey() -> None:
    for text in ('"a\\e[2J": 1\n', "cluster: '\u202ex'\n", "!<\u202e> a\n", "%\u202e 1\n--- a"):
        with pytest.raises(topology.BadTopology) as caught:
            topology.read_topology(text, name="a.yaml")
        assert all(line.isprintable() for line in caught.value.message.splitlines())


def test_the_schema_names_the_keys_and_bounds_of_the_structs() -> None:
    schema = topology.schema()
    parts = schema["definitions"]
    assert set(parts["Topology"]["properties"]) == {
        field.name for field in msgspec.structs.fields(topology.Topology)
    }
    assert parts["Topology"]["additionalProperties"] is False
    assert parts["Topology"]["required"] == ["cluster", "workers"]
    assert parts["WorkersSection"]["properties"]["count"]["maximum"] == 10_000
    assert msgspec.json.decode(msgspec.json.encode(schema)) == schema


def test_editors_can_read_the_schema_and_it_says_what_this_version_takes() -> None:
    schema = topology.schema()
    Draft7Validator.check_schema(schema)
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    problems = Draft7Validator(schema).iter_errors
    for file in sorted((ROOT / "topologies").glob("*.yaml")):
        text = file.read_text()
        assert not list(problems(Reading(text, topology.Topology, name="", examples={}).values)), file
    smallest = {"cluster": "a", "workers": {}}
    assert not list(problems(smallest | {"runtime": "compose"}))
    assert not list(problems(smallest | {"runtime": "ssh"}))
    assert list(problems(smallest | {"broker": {"hosts": ["a", "b", "c"]}}))
    assert list(problems(smallest | {"broker": {"stor": "1GiB"}}))
    text = json.dumps(schema)
    assert not re.search(r'"\$ref": "[^"]*",|, "\$ref"', text)  # beside one, nothing counts


KEYS = st.sampled_from([field.name for field in msgspec.structs.fields(topology.Topology)])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 70_000)
    | st.sampled_from(["a", "pool", "ssh", "7d", "*", "x/y"])
)
_INNER = "hosts count slots queues labels url listen store jobs logs a b http exec address state"
INNER = st.sampled_from(_INNER.split())
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(INNER, v, max_size=4), max_leaves=8
)


def load_or_refuse(text: str | bytes) -> None:
    try:
        topology.read_topology(text, name="a.yaml")
    except topology.BadTopology as refused:
        message = refused.message
    else:
        message = "fine"
    assert all(line.isprintable() for line in message.splitlines())


@given(
    st.text(max_size=200)
    | st.binary(max_size=200)
    | st.text(alphabet="ab:- \n[]{},&*!|>'\"%#?<\t\\", max_size=80)
)
def test_any_text_is_a_topology_or_a_refusal(text: str | bytes) -> None:
    load_or_refuse(text)


@given(st.dictionaries(KEYS, VALUES, max_size=8))
def test_any_values_under_known_keys_are_a_topology_or_a_refusal(values: dict[str, object]) -> None:
    # JSON is YAML, so that this reaches every type and every check without luck in punctuation.
    plain = {"cluster": "demo", "workers": {"count": 3}} | values
    load_or_refuse(msgspec.json.encode(plain))


def test_a_document_without_problems_has_nothing_to_report() -> None:
    found = strict_yaml.Problems("a.yaml")
    node = strict_yaml.parse_yaml("a: [1, 'x', ~]", found)
    assert not found
    assert node is not None
    position, items = node.value["a"]
    assert (position, [item.value for item in items.value]) == ((1, 1), [1, "x", None])


def test_a_broker_is_advertised_at_one_address_or_at_several() -> None:
    one = topology.read_topology(SMALLEST + "broker: {listen: 0.0.0.0, advertise: ci}\n", name="a.yaml")
    several = topology.read_topology(
        SMALLEST + "broker: {listen: 0.0.0.0, advertise: [ci, 'x:1']}\n", name="a.yaml"
    )
    assert (one.broker.advertised, several.broker.advertised) == (("ci",), ("ci", "x:1"))
