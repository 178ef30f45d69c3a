"""Cluster files as they are measured: the same, but for what would decide the answer by arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvmci.bench.stage import Wanted, as_measured, candidate_of, read_candidates, text_of
from mvmci.cluster.deployment import central, executors, workers
from mvmci.cluster.topology import Topology, read_topology
from mvmci.errors import Usage

WANTED = Wanted(workers=32, slots=2)


def topology(text: str) -> Topology:
    return read_topology(f"cluster: demo\n{text}".encode(), name="demo.yaml")


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(f"cluster: demo\n{text}")
    return file


def test_slots_of_executors_do_not_bind_and_it_is_said() -> None:
    found, changed = as_measured(
        topology("access: peer\nexecutors: {slots: 4}\nworkers: {slots: 2}"), "bench-1", WANTED
    )
    assert found.executors is not None and found.executors.slots is not None
    assert found.executors.slots >= 32 * 2
    assert changed == [f"executors.slots: {found.executors.slots} instead of 4"]


def test_as_it_is_slots_stay() -> None:
    wanted = Wanted(workers=4, slots=2, as_is=True)
    found, changed = as_measured(
        topology("access: peer\nexecutors: {slots: 1}\nworkers: {slots: 3}"), "b", wanted
    )
    assert found.executors is not None
    assert (found.executors.slots, found.groups[0].slots, changed) == (1, 3, [])


def test_there_are_as_many_workers_as_are_measured_at_most_and_one_group_of_them() -> None:
    text = "workers: [{name: a, count: 3, queues: [x]}, {name: b, hosts: [h], slots: 8}]\nhosts: {h: {}}"
    found, changed = as_measured(topology(text), "bench-1", WANTED)
    (group,) = found.groups
    assert (found.cluster, group.count, group.slots, group.hosts) == ("bench-1", 32, 2, ("h",))
    assert group.queues == ("default",)
    assert "workers: one group instead of 2" in changed


def test_jobs_may_ask_for_what_the_load_needs_beside_what_the_file_allows() -> None:
    wanted = Wanted(workers=1, slots=1, http=("http://127.0.0.1:8/*",))
    found, _ = as_measured(topology("workers: {}\nallow: {http: ['http://x/*']}"), "b", wanted)
    assert found.allow.http == ("http://x/*", "http://127.0.0.1:8/*")


@pytest.mark.parametrize("file", sorted(Path("topologies").glob("*.yaml")), ids=lambda file: file.stem)
def test_what_is_written_says_the_same(file: Path) -> None:
    found, _ = as_measured(read_topology(file.read_bytes(), name=file.name), "bench-1", WANTED)
    assert read_topology(text_of(found), name="again.yaml") == found


def test_without_an_access_that_shares_nothing_there_is_a_control(tmp_path: Path) -> None:
    peer = written(tmp_path, "peer.yaml", "access: peer\nexecutors: {slots: 4}\nworkers: {slots: 3}")
    found, slots = read_candidates([peer], slots=None)
    assert ({name: one.access for name, one in found.items()}, slots) == (
        {"peer": "peer", "control": "per-worker"},
        3,
    )
    assert found["control"].executors is None


def test_files_that_differ_are_measured_with_workers_of_two_slots(tmp_path: Path) -> None:
    files = [written(tmp_path, f"{n}.yaml", f"workers: {{slots: {n}}}") for n in (3, 4)]
    assert read_candidates(files, slots=None)[1] == 2
    assert read_candidates(files, slots=5)[1] == 5


def test_files_of_one_name_are_named_by_their_folders_so_two_of_one_folder_are_refused(
    tmp_path: Path,
) -> None:
    files = []
    for access in ("peer", "per-worker"):
        (tmp_path / access).mkdir()
        files.append(written(tmp_path / access, "topology.yaml", f"access: {access}\nworkers: {{}}"))
    found, _ = read_candidates(files, slots=None)
    assert {name: one.access for name, one in found.items()} == {"peer": "peer", "per-worker": "per-worker"}
    with pytest.raises(Usage, match="two files are named peer"):
        read_candidates([*files, files[0]], slots=None)


def test_the_files_that_a_file_names_are_found_from_elsewhere(tmp_path: Path) -> None:
    file = written(
        tmp_path, "a.yaml", "plugin: mine.py\nworkers: {}\nbroker: {url: 'nats://h:1', credentials: x.creds}"
    )
    (found, _) = read_candidates([file], slots=None)
    assert found["a"].plugin == str(tmp_path / "mine.py")
    assert found["a"].broker.credentials == str(tmp_path / "x.creds")


def test_no_file_is_taken_for_the_control_for_its_name(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="cannot be named control"):
        read_candidates([written(tmp_path, "control.yaml", "access: peer\nworkers: {}")], slots=None)
    alone = written(tmp_path, "control.yaml", "access: per-worker\nworkers: {}")
    assert list(read_candidates([alone], slots=None)[0]) == ["control"]


def test_a_file_of_any_name_is_a_candidate(tmp_path: Path) -> None:
    file = written(tmp_path, "We<b>ird & v1.2_.yaml", "access: per-worker\nworkers: {}")
    assert list(read_candidates([file], slots=None)[0]) == ["we-b-ird-v1-2"]


def test_on_hosts_each_has_a_broker_beside_the_users_own() -> None:
    text = "runtime: ssh\nhosts: {h: {}}\nworkers: {}\nbroker: {listen: '10.0.0.1:5000'}"
    measured = [
        as_measured(topology(text), "b", Wanted(workers=1, slots=1, place=place))[0] for place in (0, 1)
    ]
    assert [one.broker.listen for one in measured] == ["10.0.0.1:5001", "10.0.0.1:5002"]


def test_a_candidate_tells_how_many_workers_its_file_has_and_on_which_hosts_it_runs() -> None:
    found = topology(
        "access: peer\nexecutors: {hosts: [c], slots: 4}\nhosts: {a: {}, b: {}, c: {}}\n"
        "workers: [{name: x, count: 3, hosts: [a]}, {name: y, count: 2, hosts: [b, a]}]"
    )
    measured, changed = as_measured(found, "bench-1", WANTED)
    units = [*workers(measured), *executors(measured), *central(measured)]
    told = candidate_of("mine", Path("mine.yaml"), found, measured, changed, units)
    assert (told.file, told.workers, told.hosts) == ("mine.yaml", 5, ["a", "b", "c"])
    assert (told.slots, told.executors) == (2, 1)
