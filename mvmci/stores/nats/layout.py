"""Every name of a cluster in JetStream: streams, their subjects and settings, consumers.

    <cluster>-JOBS          <cluster>.job.<id>.<kind>.<queue>.<unit>     the journals
    <cluster>-HINTS         <cluster>.ready.<queue>.<id>            words that a job wants looking at
                            <cluster>.timer.<queue>.<id>            the same, scheduled for later
    <cluster>-LOGS          <cluster>.log.<id>.<queue>              output
    OBJ_<cluster>-BLOBS     $O.<cluster>-BLOBS.>                    an object store, names `sha256:…`
    KV_<cluster>-MEMBERS    $KV.<cluster>-MEMBERS.<unit>.<incarnation>   presence, in memory
    KV_<cluster>-CONFIG     $KV.<cluster>-CONFIG.>                  what the cluster is and allows

The sizes sum up to less than the store, so that logs and blobs cannot eat the journals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mvmci.jobs.job import check_id
from mvmci.jobs.journal import OUTSIDE, MessageKind, Origin
from mvmci.store import HINT_LAPSE_S

STORE_BYTES = 10 << 30
MEMBERS_BYTES = 16 << 20
MEMBER_AGE_S = 10  # a unit that has been silent for so long is forgotten
LOG_AGE_MS = 2 * 86_400_000
ACKS_PENDING_MAX = 65_536  # jobs of one queue that may be at work
PULLS_WAITING_MAX = 8_192
EXPECTED = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_OF = "Nats-Expected-Last-Subject-Sequence-Subject"
_NS = 1_000_000_000
_NS_PER_MS = 1_000_000


class Layout:
    """The names of one cluster."""

    def __init__(self, cluster: str) -> None:
        self.cluster = check_id(cluster, "cluster name")
        self.jobs = f"{cluster}-JOBS"
        self.hints = f"{cluster}-HINTS"
        self.logs = f"{cluster}-LOGS"
        self.blobs_bucket = f"{cluster}-BLOBS"
        self.blobs = f"OBJ_{self.blobs_bucket}"
        self.members_bucket = f"{cluster}-MEMBERS"
        self.members = f"KV_{self.members_bucket}"
        self.config_bucket = f"{cluster}-CONFIG"
        self.config = f"KV_{self.config_bucket}"

    def message(self, job: str, kind: MessageKind, queue: str, unit: str) -> str:
        """Where `unit` writes to a journal: the broker lets nobody write in the name of another.

        Who ends a job without holding it has a name that is no unit's: nothing of that can be a holder's.
        """
        if kind == "end":
            kind, unit = "done", OUTSIDE + unit
        return f"{self.cluster}.job.{job}.{kind}.{queue}.{unit}"

    def journal(self, job: str) -> str:
        return f"{self.cluster}.job.{job}.>"

    def journal_in(self, job: str, queue: str) -> str:
        """What was written to a journal as of `queue`: what is of others moves nothing there."""
        return f"{self.cluster}.job.{job}.*.{queue}.>"

    def journals(self) -> str:
        return f"{self.cluster}.job.>"

    def ends(self) -> str:
        return f"{self.cluster}.job.*.done.*.*"

    def specs(self, queue: str) -> str:
        return f"{self.cluster}.job.*.spec.{queue}.*"

    def ready(self, queue: str, job: str) -> str:
        return f"{self.cluster}.ready.{queue}.{job}"

    def timer(self, queue: str, job: str) -> str:
        return f"{self.cluster}.timer.{queue}.{job}"

    def log(self, job: str, queue: str) -> str:
        return f"{self.cluster}.log.{job}.{queue}"

    def log_of(self, job: str) -> str:
        return f"{self.cluster}.log.{job}.*"

    def job_of_log(self, subject: str) -> str:
        return subject.split(".")[2]

    def blob_info(self, name: str) -> str:
        return f"$O.{self.blobs_bucket}.M.{name}"

    def blob_chunks(self, nuid: str) -> str:
        return f"$O.{self.blobs_bucket}.C.{nuid}"

    def setting(self, key: str) -> str:
        return f"$KV.{self.config_bucket}.{key}"

    def setting_of(self, subject: str) -> str:
        """The key of a setting, by its subject."""
        return subject.removeprefix(f"$KV.{self.config_bucket}.")

    def stored(self, what: Literal["job", "log"], job: str) -> str:
        """Where the broker says, without the bytes, that it stored a message of JOBS or LOGS about `job`.

        One literal subject a job: for each subscription with a wildcard that ends, the broker looks through
        all answers that it has yet to pass on between accounts.
        """
        return f"{self.cluster}.stored.{what}.{job}"

    def enrol(self, ticket: str) -> str:
        return f"{self.cluster}.enrol.{ticket}"

    def renew(self, unit: str) -> str:
        return f"{self.cluster}.renew.{unit}"

    def ping(self, worker: str, request: str) -> str:
        """Where executors listen also while they have no free slot, only to say that they are there."""
        return f"{self.cluster}.ping.{worker}.{request}"

    def engine(self, worker: str, request: str) -> str:
        """Where executors with a free slot listen for jobs."""
        return f"{self.cluster}.engine.{worker}.{request}"

    def capacity(self) -> str:
        """Where an executor says that it has a free slot again."""
        return f"{self.cluster}.capacity"

    def reply(self, worker: str, request: str) -> str:
        """Where a worker hears what becomes of a request of its own."""
        return f"{self.cluster}.reply.{worker}.{request}"

    def measure(self) -> str:
        """Where units are asked for their metrics, and told for how long to watch what costs something."""
        return f"{self.cluster}.measure"

    def measured(self, unit: str, incarnation: str) -> str:
        """Where a unit tells its metrics."""
        return f"{self.cluster}.measured.{unit}.{incarnation}"

    def member(self, unit: str, incarnation: str) -> str:
        return f"$KV.{self.members_bucket}.{unit}.{incarnation}"

    def member_of(self, subject: str) -> tuple[str, str]:
        """The unit and the incarnation that said something there."""
        _, unit, incarnation = subject.rsplit(".", 2)
        return unit, incarnation

    def job_of_message(self, subject: str) -> str:
        """The job of a message of a journal; who publishes may put there what is no id."""
        return subject.split(".")[2]

    def begins(self, subject: str, headers: Mapping[str, str]) -> bool:
        """Whether a spec is surely the first message of its job: it was stored behind none, says the broker.

        Anybody who may submit can publish another spec later, without that expectation.
        """
        subtree = self.journal(self.job_of_message(subject))
        return headers.get(EXPECTED) == "0" and headers.get(EXPECTED_OF) == subtree

    def origin_of_message(self, subject: str) -> Origin:
        """What the broker vouches for of a message of a journal. What is not there is empty."""
        kind, queue, unit, *_ = [*subject.split(".")[3:], "", "", ""]
        return Origin(kind, queue, unit)

    def is_spec(self, subject: str) -> bool:
        """Whether that is the subject of a job's first message."""
        return subject.split(".")[3] == "spec"

    def job_of_hint(self, subject: str) -> tuple[str, bool]:
        """The job that a hint is about, which may be no id, and whether it is the job's own spec."""
        tokens = subject.split(".")
        return (tokens[2], True) if tokens[1] == "job" else (tokens[3], False)

    def streams(self, store_bytes: int, log_age_ms: int = LOG_AGE_MS) -> list[dict[str, Any]]:
        """The settings of every stream, for a store of `store_bytes`.

        None but HINTS takes a message that rolls up the ones before it: whoever may write one subject
        could remove all others with it. Where messages are scheduled the server will have it so.
        """
        return [
            _stream(
                self.jobs,
                self.journals(),
                store_bytes * 45 // 100,
                discard="new",
                deny_delete=True,
                allow_direct=True,
                allow_atomic=True,
                republish=self._says("job", f"{self.cluster}.job.*.*.*.*"),
            ),
            _stream(
                self.hints,
                self.ready("*", "*"),
                store_bytes * 5 // 100,
                retention="workqueue",
                max_msgs_per_subject=1,
                allow_msg_schedules=True,
                allow_direct=True,
            )
            | {"subjects": [self.ready("*", "*"), self.timer("*", "*")]},
            _stream(
                self.logs,
                self.log("*", "*"),
                store_bytes * 15 // 100,
                max_age=log_age_ms * _NS_PER_MS,
                allow_direct=True,
                republish=self._says("log", self.log("*", "*")),
            ),
            _stream(
                self.blobs,
                f"$O.{self.blobs_bucket}.M.>",
                store_bytes * 25 // 100,
                discard="new",
                allow_direct=True,
            )
            | {"subjects": [f"$O.{self.blobs_bucket}.C.>", f"$O.{self.blobs_bucket}.M.>"]},
            _bucket(self.config, self.config_bucket, store_bytes // 100),
            self.members_stream(),
        ]

    def _says(self, what: Literal["job", "log"], subject: str) -> dict[str, Any]:
        return {"src": subject, "dest": self.stored(what, "{{wildcard(1)}}"), "headers_only": True}

    def members_stream(self) -> dict[str, Any]:
        """On file it would be synced at each heartbeat; a broker that restarts loses it, and may."""
        ages = {"storage": "memory", "max_age": MEMBER_AGE_S * _NS}
        return _bucket(self.members, self.members_bucket, MEMBERS_BYTES) | ages

    def consumers(self, queue: str, lapse_s: float = HINT_LAPSE_S) -> list[tuple[str, dict[str, Any]]]:
        """The two consumers of a queue, each with its stream."""
        return [
            (self.jobs, _consumer(f"spec-{queue}", self.specs(queue), lapse_s)),
            (self.hints, _consumer(f"ready-{queue}", self.ready(queue, "*"), lapse_s)),
        ]


def _stream(name: str, subject: str, bytes_max: int, **more: Any) -> dict[str, Any]:
    usual = {"name": name, "subjects": [subject], "max_bytes": bytes_max, "storage": "file", "discard": "old"}
    return usual | {"retention": "limits", "num_replicas": 1} | more


def _bucket(name: str, bucket: str, bytes_max: int) -> dict[str, Any]:
    return _stream(
        name,
        f"$KV.{bucket}.>",
        bytes_max,
        discard="new",
        max_msgs_per_subject=1,
        allow_direct=True,
        deny_delete=True,
    )


def _consumer(name: str, subject: str, lapse_s: float) -> dict[str, Any]:
    """Deliveries are never used up: attempts are counted in the journal."""
    return {
        "durable_name": name,
        "name": name,
        "filter_subject": subject,
        "deliver_policy": "all",
        "ack_policy": "explicit",
        "ack_wait": int(lapse_s * _NS),
        "max_deliver": -1,
        "max_ack_pending": ACKS_PENDING_MAX,
        "max_waiting": PULLS_WAITING_MAX,
    }
