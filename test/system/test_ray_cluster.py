"""The file for `serve deploy` on a cluster of Ray: the voice that comes with Light-TTS on two replicas, one
of them killed, both replaced while they speak, and as many as the load needs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from support.replicas import fronts, run_streams, urls
from support.server_process import speak

pytest.importorskip("ray")
from support.ray_cluster import Cluster, start_cluster

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.timeout(1500)]

STREAMS = 32
SPEECH = {"voice": "anna", "tokens": 50}
FIXED = {"autoscaling_config": None, "num_replicas": 2}
PATIENT = "--max_wait 600 --request_timeout 600"  # so that a slow machine refuses none


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster() as running:
        yield running


def test_the_file_is_served_as_it_is(cluster):
    cluster.deploy(cluster.file())
    cluster.wait_for(2)
    with cluster.server.client() as client:
        assert speak(client, "Hello.", spk_id="anna").status_code == 200


def test_one_of_two_replicas_is_killed_and_both_are_replaced_while_32_streams_speak(cluster):
    cluster.deploy(cluster.file(**FIXED), PATIENT)
    cluster.wait_for(2)
    victim = fronts(cluster.server)[0]

    found = run_streams(
        cluster.server, STREAMS, lambda: os.kill(victim.pid, signal.SIGKILL), begun=8, **SPEECH
    )
    print(f"a server killed: {found}")
    assert not found.broken_not_begun and not found.refused, found
    assert found.complete + found.broken_begun == STREAMS
    assert len(set(found.sizes)) == 1, "an answer that was broken off must not look complete"
    cluster.wait_for(2)

    before = set(urls(cluster.server))
    update = threading.Thread(
        target=cluster.deploy, args=(cluster.file(**FIXED), PATIENT, "--max_part_tokens 500")
    )
    found = run_streams(cluster.server, STREAMS, update.start, begun=8, **SPEECH)
    print(f"replicas replaced: {found}")
    update.join()
    cluster.wait_for(2)
    assert found.complete == STREAMS, found
    assert not before & set(urls(cluster.server)), "no replica was replaced"


def test_a_second_replica_comes_with_the_load_and_goes_after_it(cluster):
    scaling = cluster.file()["applications"][0]["deployments"][0]["autoscaling_config"]
    scaling |= {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 1, "downscale_delay_s": 3}
    scaling |= {"look_back_period_s": 3, "metrics_interval_s": 1}
    scaling["policy"]["policy_kwargs"] = {"seconds": 10}
    cluster.deploy(cluster.file(autoscaling_config=scaling), PATIENT)
    cluster.wait_for(1)

    seen = 0

    def watch() -> None:
        nonlocal seen
        end = time.monotonic() + 200
        while seen < 2 and time.monotonic() < end:
            seen = max(seen, cluster.status()[1])
            time.sleep(0.5)

    found = run_streams(cluster.server, 16, watch, begun=1, **SPEECH)
    assert seen == 2 and found.complete == 16, (seen, found)
    cluster.wait_for(1)
