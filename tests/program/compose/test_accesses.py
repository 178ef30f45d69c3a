"""The black-box suite again, on containers: one cluster, which moves from each access to the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.cluster import Cluster
from tests.harness.server import serving
from tests.program.cluster.test_accesses import (  # noqa: F401 (they run here too)
    ACCESSES,
    Way,
    test_a_cancel_ends_a_running_job,
    test_a_command_runs_and_its_streams_and_its_end_come_back,
    test_a_workflow_has_its_effects_once_and_its_result_comes_back,
    test_its_units_are_seen_and_up_again_changes_nothing,
    test_metrics_are_of_every_unit_and_count_what_was_done,
    test_where_the_time_of_a_job_went_is_told_and_the_parts_add_up,
    test_whoever_is_killed_a_workflow_goes_on_and_repeats_no_effect,
)
from tests.program.compose.conftest import Docker

CIRCUIT = ("per-worker", "peer", "pool behind HAProxy", "shared")
TOPOLOGY = """
cluster: demo
runtime: compose
{access}
workers: {{count: 2, slots: 4}}
allow: {{http: ['{url}/*']}}
compose: {{base: '{base}'}}
"""


@pytest.fixture(scope="module", params=CIRCUIT)
def way(request: pytest.FixtureRequest, cluster: Cluster, docker: Docker) -> Iterator[Way]:
    with serving(docker.gateway) as server:
        text = TOPOLOGY.format(access=ACCESSES[request.param], url=server.url, base=docker.base)
        cluster.write(text)
        cluster.up()
        yield Way(cluster, request.param, server)
