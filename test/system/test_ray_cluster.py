"""The file for `serve deploy` on a cluster of Ray: the voice that comes with Light-TTS on two replicas, one
of them killed, both replaced while they speak, and as many as the load needs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from support.replicas import audio_in_work, fronts, replica_of, run_streams, urls
from support.server_process import speak

pytest.importorskip("ray")
from support.ray_cluster import Cluster, start_cluster

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.timeout(1500)]

STREAMS = 32
SPEECH = {"voice": "anna", "tokens": 50}
FIXED = {"autoscaling_config": None, "num_replicas": 2}
PATIENT = "--max_wait 600 --request_timeout 600 --drain_timeout 600"  # so that a slow machine refuses none
CHANGE = "--max_part_tokens 500"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster() as running:
        yield running


def test_the_file_is_served_as_it_is(cluster):
    cluster.deploy(cluster.file())
    cluster.wait_for(2)
    with cluster.server.client() as client:
        assert speak(client, "Hello.", spk_id="anna").status_code == 200


def test_a_server_is_killed_and_both_replicas_are_replaced_while_32_streams_speak(cluster):
    cluster.deploy(cluster.file(**FIXED), PATIENT)
    cluster.wait_for(2)
    victim, before = fronts(cluster.server)[0], set(urls(cluster.server))
    name = replica_of(victim)
    update = threading.Thread(target=cluster.deploy, args=(cluster.file(**FIXED), PATIENT, CHANGE))

    def kill_and_update() -> None:
        victim.kill()
        update.start()

    found = run_streams(cluster.server, STREAMS, kill_and_update, begun=8, **SPEECH)
    print(f"a server killed, then replicas replaced: {found}")
    update.join()
    assert not found.not_begun and not found.refused, found
    assert len(found.complete) + len(found.cut_off) == STREAMS, found
    assert set(found.cut_off) <= {name}, "a stream of the other replica was cut off"
    assert len(set(found.sizes)) == 1, "an answer that was broken off must not look complete"
    cluster.wait_for(2)
    assert not before & set(urls(cluster.server)), "no replica was replaced"


def test_a_process_of_ray_is_killed_while_32_streams_speak(cluster):
    cluster.deploy(cluster.file(**FIXED), PATIENT)
    cluster.wait_for(2)
    front = fronts(cluster.server)[0]
    name, victim = replica_of(front), front.ppid()

    found = run_streams(cluster.server, STREAMS, lambda: os.kill(victim, signal.SIGKILL), begun=8, **SPEECH)
    print(f"a process of Ray killed: {found}")
    assert not found.not_begun and not found.refused, found
    assert len(found.complete) + len(found.cut_off) == STREAMS, found
    assert set(found.cut_off) <= {name}, "a stream of the other replica was cut off"
    assert len(set(found.sizes)) == 1, "an answer that was broken off must not look complete"


def test_a_rolling_update_cuts_off_no_stream(cluster):
    cluster.deploy(cluster.file(**FIXED), PATIENT)
    cluster.wait_for(2)
    before = set(urls(cluster.server))
    update = threading.Thread(target=cluster.deploy, args=(cluster.file(**FIXED), PATIENT, CHANGE))

    found = run_streams(cluster.server, STREAMS, update.start, begun=8, **SPEECH)
    print(f"replicas replaced: {found}")
    update.join()
    assert len(found.complete) == STREAMS, found
    cluster.wait_for(2)
    assert not before & set(urls(cluster.server)), "no replica was replaced"


def test_a_replica_that_is_removed_finishes_its_streams(cluster):
    cluster.deploy(cluster.file(**FIXED), PATIENT)
    cluster.wait_for(2)
    before = {replica_of(front) for front in fronts(cluster.server)}
    in_work = []

    def remove_one() -> None:
        in_work.extend(audio_in_work(url) for url in urls(cluster.server))
        cluster.deploy(cluster.file(autoscaling_config=None, num_replicas=1), PATIENT)

    found = run_streams(cluster.server, STREAMS, remove_one, begun=8, **SPEECH)
    print(f"a replica removed, {in_work} s of audio in work: {found}")
    assert all(in_work), "a replica had no streams when one was removed"
    assert len(found.complete) == STREAMS and set(found.complete) == before, found
    cluster.wait_for(1)
    assert replica_of(fronts(cluster.server)[0]) in before


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
    assert seen == 2 and len(found.complete) == 16, (seen, found)
    cluster.wait_for(1)
