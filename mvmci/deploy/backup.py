"""Back-up of a cluster into a folder, while it runs, and the way back.

    <folder>/backup.json               what is here: `Manifest`, written last
             <part>/<first>.seg        the messages of a stream from a sequence on, as they lie there
             topology.yaml             the file as it was last applied
             keys/                     the keys of the cluster, if they were asked for

Streams are read in the order in which a record names what was written before it: journals first, then blobs,
so that every blob that a kept journal names is kept. A second back-up into the same folder reads on from
where the first one ended. Nothing here is believed: every file stands in the manifest with its digest.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
from filelock import FileLock, Timeout

from mvmci.cluster.witness import Seen, Witness, config_losses, losses
from mvmci.deploy.state import ClusterState
from mvmci.errors import LockHeld, StoreUnavailable, Usage
from mvmci.jobs.job import check_id
from mvmci.roles.broker import FOLDER
from mvmci.store import MESSAGE_BYTES_MAX, ClusterSettings
from mvmci.stores.nats import Cluster, Part
from mvmci.stores.nats.config import DELETED, LOSS, SETTINGS, WITNESS
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.rows import Row
from mvmci.stores.nats.write import write_stream
from mvmci.system.clock import wall_clock_ms
from mvmci.system.files import write_private
from mvmci.trust.authority import Authority
from mvmci.trust.known import KEYS

FORMAT = 1
MANIFEST = "backup.json"
SEGMENT_BYTES = 8 << 20  # of messages in one file
SEGMENT_BYTES_MAX = 32 << 20  # of one that is believed
MANIFEST_BYTES_MAX = 64 << 20
KEY_BYTES_MAX = 1 << 20
PARTS: tuple[Part, ...] = get_args(Part)
_NAME = re.compile(r"[0-9]{20}\.seg")


class Segment(msgspec.Struct, frozen=True):
    """One file of messages: the first and the last sequence, how many there are, what it is."""

    file: str
    first: int
    last: int
    messages: int
    size: int
    sha256: str


class Stream(msgspec.Struct):
    """A part of a cluster: when its stream was made, and how far a whole back-up goes."""

    created: str
    until: int = 0
    segments: list[Segment] = []


class Manifest(msgspec.Struct, kw_only=True):
    """What a folder holds. `at` (ms since 1970) is 0 until the first back-up was whole."""

    format: int
    cluster: str
    at: int = 0
    parts: dict[Part, Stream] = {}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a back-up or a restore came to, as `--json` prints it: its time, and messages of each part."""

    cluster: str
    at: int
    messages: dict[Part, int]
    new: dict[Part, int] = {}
    jobs: int | None = None  # a back-up, which adds what is new, does not count them
    missing: list[str] = []  # what came after, as far as a witness on this machine knows it


_segments: msgspec.msgpack.Decoder[list[Row]] = msgspec.msgpack.Decoder(list[Row])


# ---- There


async def back_up(
    cluster: Cluster, state: ClusterState, folder: Path, *, keys: bool, say: Callable[[str], None]
) -> Report:
    """Add what is new in `cluster` to the back-up in `folder`. Raises StoreUnavailable, LockHeld, Usage."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder):
            manifest = _begun(folder, cluster.layout.cluster)
            new = {part: await _add(cluster, part, manifest, folder, say) for part in PARTS}
            for name in ("topology.yaml", *((f"{KEYS}/{one.name}" for one in _keys(state)) if keys else ())):
                if (state.folder / name).exists():
                    write_private(folder / name, (state.folder / name).read_bytes())
            for part in PARTS:
                segments = manifest.parts[part].segments
                manifest.parts[part].until = segments[-1].last if segments else 0
            manifest.at = wall_clock_ms()
            _write(folder, manifest)
    except OSError as error:
        raise Usage(f"the back-up {folder} cannot be written: {error.strerror}") from error
    return Report(cluster=manifest.cluster, at=manifest.at, messages=_messages(manifest), new=new)


def _keys(state: ClusterState) -> list[Path]:
    place = state.folder / KEYS
    return sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else []


def _begun(folder: Path, cluster: str) -> Manifest:
    """The manifest of the folder, or a new one. Raises Usage."""
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        if manifest.cluster != cluster:
            raise Usage(f"{folder} is a back-up of {manifest.cluster}, not of {cluster}", hint="name another")
        return manifest
    if any(file.name != "lock" and not (file.is_dir() and file.name in PARTS) for file in folder.iterdir()):
        raise Usage(f"{folder} is not empty, and no back-up", hint="name a new folder")
    return Manifest(format=FORMAT, cluster=cluster)


async def _add(
    cluster: Cluster, part: Part, manifest: Manifest, folder: Path, say: Callable[[str], None]
) -> int:
    """Read on to where the stream ends now; how many messages are new."""
    seen = await cluster.look(part)
    if seen is None:
        raise StoreUnavailable(f"the stream of {part} is not there yet", hint="try again")
    stream = manifest.parts.setdefault(part, Stream(seen.created))
    last = stream.segments[-1].last if stream.segments else 0
    if stream.created != seen.created or seen.last < last:
        raise Usage(
            f"{folder} is a back-up of other streams of {manifest.cluster} than those that there are now",
            hint="name a new folder; the old one is still good for a restore",
        )
    rows, size, new = list[Row](), 0, 0
    async for row in cluster.rows(part, last):
        if row.seq > seen.last:
            break
        rows.append(row)
        size += len(row.data) + len(row.subject) + 64
        new += 1
        if size >= SEGMENT_BYTES:
            _add_segment(folder, part, manifest, rows)
            say(f"{part}: {row.seq} of {seen.last}")
            rows, size = [], 0
    if rows:
        _add_segment(folder, part, manifest, rows)
        say(f"{part}: {seen.last} of {seen.last}")
    return new


def _add_segment(folder: Path, part: Part, manifest: Manifest, rows: list[Row]) -> None:
    """Write a file of messages, then the manifest: who is interrupted has a back-up that the next goes on."""
    data = msgspec.msgpack.encode(rows)
    name = f"{rows[0].seq:020}.seg"
    write_private(folder / part / name, data)
    digest = hashlib.sha256(data).hexdigest()
    segment = Segment(name, rows[0].seq, rows[-1].seq, len(rows), len(data), digest)
    manifest.parts[part].segments.append(segment)
    _write(folder, manifest)


def _write(folder: Path, manifest: Manifest) -> None:
    write_private(folder / MANIFEST, msgspec.json.encode(manifest))


def _locked(folder: Path) -> FileLock:
    lock = FileLock(folder / "lock", mode=0o600, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LockHeld(f"another process is at work on the back-up {folder}", hint="wait for it") from None
    return lock


def _messages(manifest: Manifest) -> dict[Part, int]:
    return {
        part: sum(one.messages for one in stream.segments if one.last <= stream.until)
        for part, stream in manifest.parts.items()
    }


# ---- And back


def read_manifest(folder: Path) -> Manifest:
    """What the back-up in `folder` is. Raises Usage."""
    file = folder / MANIFEST
    try:
        if file.stat().st_size > MANIFEST_BYTES_MAX:
            raise Usage(f"{file} is larger than any that `mvmci backup` writes")
        manifest = msgspec.json.decode(file.read_bytes(), type=Manifest)
    except OSError as error:
        raise Usage(f"{folder} is no back-up: {MANIFEST} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise Usage(f"the back-up {folder} is damaged: {MANIFEST}: {error}") from None
    if manifest.format != FORMAT:
        raise Usage(f"{folder} is a back-up of format {manifest.format}, where this mvmci knows {FORMAT}")
    check_id(manifest.cluster, "cluster name")
    return manifest


def restore(root: Path, folder: Path, *, say: Callable[[str], None]) -> Report:
    """Lay the streams of the back-up in `folder` down for the cluster that it is of, which `up` then starts.

    Only where there is no store of that cluster. Raises Usage, LockHeld.
    """
    try:
        return _restore(root, folder, say)
    except OSError as error:
        raise Usage(f"{folder} cannot be restored to {root}: {error.strerror}") from error


def _restore(root: Path, folder: Path, say: Callable[[str], None]) -> Report:
    manifest = read_manifest(folder)
    if not manifest.at or set(manifest.parts) != set(PARTS):
        raise Usage(f"the back-up {folder} was never finished", hint="`mvmci backup` to it again")
    state = ClusterState(root, manifest.cluster)
    with state.lock():
        store = state.folder / FOLDER / "store"
        if store.exists() or state.facts() is not None:
            raise Usage(
                f"{state.folder} has a cluster: a restore would take its place",
                hint="name an empty directory with --state, or move that one away",
            )
        staged = store.with_name("store.restoring")
        if staged.exists():
            shutil.rmtree(staged)
        for part in PARTS:
            for _ in _rows(folder, manifest, part):
                pass  # all of it is looked at before anything is written
        with_keys = _restore_keys(folder, state.folder)
        account = Authority.create(state.folder).issuer
        report = _write_streams(
            state, folder, manifest, staged / "jetstream" / account / "streams", with_keys, say
        )
        staged.rename(store)
        return report


def _write_streams(
    state: ClusterState,
    folder: Path,
    manifest: Manifest,
    to: Path,
    with_keys: bool,
    say: Callable[[str], None],
) -> Report:
    """Write all streams as files beneath `to`."""
    small: tuple[Part, ...] = ("config", "jobs")  # the others need not fit into memory
    parts = {part: list(_rows(folder, manifest, part)) for part in small}
    layout, settings = Layout(manifest.cluster), _settings(parts["config"])
    wanted = {one["name"]: one for one in layout.streams(settings.store_bytes, settings.logs_ms)}
    config = _config_rows(layout, parts["config"], with_keys=with_keys)
    seen = {part: _seen(manifest, part, parts.get(part)) for part in PARTS}
    witness = msgspec.json.encode(Witness(jobs=seen["jobs"], blobs=seen["blobs"]))
    last = max([row.seq for row in config], default=0) + 1
    config.append(Row(last, manifest.at * 10**6, layout.setting(WITNESS), b"", witness))
    for part in PARTS:
        name = getattr(layout, part)
        rows = config if part == "config" else parts.get(part) or _rows(folder, manifest, part)
        say(f"{part}: {manifest.parts[part].until}")
        taken = _consumers(layout, parts["jobs"]) if part == "jobs" else []
        write_stream(to / name, manifest.parts[part].created, wanted[name], rows, taken)
    return Report(
        cluster=manifest.cluster,
        at=manifest.at,
        messages=_messages(manifest),
        jobs=len({layout.job_of_message(row.subject) for row in parts["jobs"]}),
        missing=_came_after(state, layout, seen, Seen(seen["config"].created, last, len(config))),
    )


def _rows(folder: Path, manifest: Manifest, part: Part) -> Iterator[Row]:
    """The messages of a part, each file of which is checked before one of it is given. Raises Usage."""
    stream, last = manifest.parts[part], 0
    subject = _subjects(Layout(manifest.cluster))[part]
    for segment in stream.segments:
        if segment.last > stream.until:
            return  # of a later back-up, which was not finished
        rows = _read_segment(folder / part, segment)
        for row in rows:
            if row.seq <= last or not _is_good(row, subject):
                raise Usage(f"the back-up {folder} is damaged: {segment.file} of {part}, message {row.seq}")
            last = row.seq
            yield row


def _subjects(layout: Layout) -> dict[Part, re.Pattern[str]]:
    """What the subjects of each part look like."""
    word = r"[A-Za-z0-9_=-]{1,200}"
    cluster = re.escape(layout.cluster)
    return {
        "jobs": re.compile(rf"{cluster}\.job\.{word}\.(spec|run|cancel|done)\.{word}\.{word}"),
        "blobs": re.compile(rf"\$O\.{cluster}-BLOBS\.[CM]\.{word}"),
        "logs": re.compile(rf"{cluster}\.log\.{word}(\.{word})+"),
        "config": re.compile(rf"\$KV\.{cluster}-CONFIG(\.{word})+"),
    }


def _is_good(row: Row, subject: re.Pattern[str]) -> bool:
    """Whether it can be a message of ours."""
    return (
        0 < row.seq < 1 << 53
        and 0 < row.at < 1 << 63
        and row.headers in (b"", DELETED)
        and len(row.data) <= MESSAGE_BYTES_MAX
        and subject.fullmatch(row.subject) is not None
    )


def _read_segment(folder: Path, segment: Segment) -> list[Row]:
    file = folder / segment.file
    try:
        if _NAME.fullmatch(segment.file) is None or file.stat().st_size > SEGMENT_BYTES_MAX:
            raise Usage(f"the back-up is damaged: {file} is none of its files")
        data = file.read_bytes()
    except OSError as error:
        raise Usage(f"the back-up is damaged: {file} cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != segment.sha256:
        raise Usage(f"the back-up is damaged: {file} is not as it was written")
    try:
        return _segments.decode(data)
    except msgspec.DecodeError as error:
        raise Usage(f"the back-up is damaged: {file}: {error}") from None


def _restore_keys(folder: Path, cluster: Path) -> bool:
    """Put the keys of the back-up, if it has any, where those of the cluster are."""
    place = folder / KEYS
    files = sorted(place.iterdir()) if place.is_dir() else []
    for file in files:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > KEY_BYTES_MAX:
            raise Usage(f"the back-up is damaged: {file} is no key")
        write_private(cluster / KEYS / file.name, file.read_bytes())
    return bool(files)


def _settings(config: list[Row]) -> ClusterSettings:
    for row in reversed(config):
        if row.subject.endswith(f".{SETTINGS}") and not row.headers:
            return msgspec.json.decode(row.data, type=ClusterSettings)
    return ClusterSettings()


def _config_rows(layout: Layout, rows: list[Row], *, with_keys: bool) -> list[Row]:
    """The newest word of each key. Without the cluster's keys, who was enrolled by them is nobody."""
    newest = {row.subject: row for row in rows}
    left_out = {layout.setting(WITNESS), layout.setting(LOSS)}
    return sorted(
        row
        for subject, row in newest.items()
        if subject not in left_out
        and (with_keys or not layout.setting_of(subject).startswith(("unit.", "ticket.", "account.")))
    )


def _seen(manifest: Manifest, part: Part, rows: list[Row] | None) -> Seen:
    """How the stream of a part will be."""
    stream = manifest.parts[part]
    count = len(rows) if rows is not None else _messages(manifest)[part]
    last = rows[-1].seq if rows else stream.until
    return Seen(stream.created, last, count)


def _consumers(layout: Layout, jobs: list[Row]) -> list[dict[str, Any]]:
    """Those of JOBS begin behind what is there: the control plane looks after jobs that have not ended.

    A spec that is delivered for the first time would be taken for a job that nobody can have tried.
    """
    begin = {"deliver_policy": "by_start_sequence", "opt_start_seq": jobs[-1].seq + 1 if jobs else 1}
    queues = sorted({layout.origin_of_message(row.subject).queue for row in jobs})
    of_jobs = [one for queue in queues for stream, one in layout.consumers(queue) if stream == layout.jobs]
    return [{**one, **begin, "replay_policy": "instant", "num_replicas": 0} for one in of_jobs]


def _came_after(state: ClusterState, layout: Layout, seen: dict[Part, Seen], config: Seen) -> list[str]:
    """What is known here to have been in the streams after the back-up."""
    names = {"jobs": layout.jobs, "blobs": layout.blobs}
    told: list[str] = []
    for file in sorted(state.folder.glob("units/*/witness.json")):
        try:
            kept = msgspec.json.decode(file.read_bytes(), type=Witness)
        except (OSError, msgspec.DecodeError):
            continue
        told += losses(kept, kept, seen["jobs"], seen["blobs"], names)
        told += config_losses(kept.config, config, layout.config) if kept.config is not None else []
    return list(dict.fromkeys(told))
