"""Stages are killed with SIGKILL under eight concurrent streams: every client still gets all its audio."""

import asyncio
import os
import signal
from collections.abc import Iterator

import httpx
import numpy as np
import psutil
import pytest
from support.server_process import ROOT, Server, speak, start_server
from support.streams import CLIENTS, TOKENS, Client, assert_same_audio, run_clients, stage_pid
from support.waiting import eventually

PACKED_DECODE = """
import sys
if "light_tts.server.core.stage_main" in sys.orig_argv and "decode" in sys.orig_argv:
    import pytest
    from support.packed_on_cpu import packed_stage
    packed_stage(pytest.MonkeyPatch())
"""


@pytest.fixture
def server(mortal_server):
    return mortal_server


def kill_when(server, stage: str, index: int, bytes_received: int, clients_that_far: int):
    """A disturbance: kill the stage as soon as that many clients have got that much audio."""

    async def disturb(clients: list[Client]) -> None:
        pid = stage_pid(server, stage, index)
        while sum(len(client.received) >= bytes_received for client in clients) < clients_that_far:
            await asyncio.sleep(0.002)
        os.kill(pid, signal.SIGKILL)

    return disturb


def test_two_undisturbed_runs_give_the_same_samples(server, undisturbed):
    assert all(len(samples) == TOKENS * 960 for samples in undisturbed)
    assert_same_audio(run_clients(server), undisturbed)


@pytest.mark.parametrize(
    ("stage", "index", "bytes_received", "clients_that_far"),
    [
        pytest.param("decode", 0, 1, 1, id="decode 0 at the first chunk"),
        pytest.param("llm", 0, 1, 2, id="llm at the second client's first chunk"),
        pytest.param("encode", 0, 0, 0, id="encode before any audio"),
        pytest.param("decode", 1, 90_000, 3, id="decode 1 in the middle"),
        pytest.param("llm", 0, 0, 0, id="llm before any audio"),
        pytest.param("encode", 0, 1, 1, id="encode at the first chunk"),
        pytest.param("decode", 0, 0, 0, id="decode 0 before any audio"),
    ],
)
def test_killed_stage_loses_no_sample(server, undisturbed, stage, index, bytes_received, clients_that_far):
    server.wait_until_ready()
    got = run_clients(server, kill_when(server, stage, index, bytes_received, clients_that_far))
    assert_same_audio(got, undisturbed)


@pytest.fixture
def caching_server(tmp_path, monkeypatch) -> Iterator[Server]:
    """A server whose decode processes run the packed flow with cached state, as on a GPU."""
    (tmp_path / "sitecustomize.py").write_text(PACKED_DECODE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "test")]))
    flags = {"decode_process_num": 2, "decode_max_batch_size": 4, "n_timesteps": 2}
    with start_server(flow_memory_gpu_mb=64, **flags) as running:
        yield running


@pytest.mark.nightly
def test_cached_state_of_a_killed_process_is_computed_again(caching_server):
    """The samples are the same but for rounding, which the phase of the vocoder adds up."""
    assert caching_server.output.count("the flow caches the state of up to") == 2
    undisturbed = run_clients(caching_server)
    got = run_clients(caching_server, kill_when(caching_server, "decode", 0, 1, 2))
    assert "decode 0 died" in caching_server.output
    for number, (samples, expected) in enumerate(zip(got, undisturbed, strict=True)):
        assert len(samples) == len(expected) == TOKENS * 960, f"client {number}"
        difference = np.abs(samples.astype(int) - expected)
        assert difference.mean() < 1, f"client {number}"


def test_killed_http_worker_costs_only_its_own_connections(server, undisturbed):
    server.wait_until_ready()
    workers = server.workers
    assert len(workers) == 2

    async def run() -> list[bytes | BaseException]:
        tasks: list[asyncio.Future] = []
        # The kernel spreads connections as it likes: call again until both workers have some.
        while len(tasks) < CLIENTS or not all(serves_somebody(server, worker) for worker in workers):
            tasks.append(asyncio.ensure_future(Client(server, len(tasks) % CLIENTS).run()))
            assert len(tasks) < 60, "one worker gets all connections"
            await asyncio.sleep(0.02)
        workers[0].kill()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(run())
    survivors = [number for number, result in enumerate(results) if isinstance(result, bytes)]
    assert 0 < len(survivors) < len(results)
    assert_same_audio(
        [np.frombuffer(results[number], np.int16) for number in survivors],
        [undisturbed[number % CLIENTS] for number in survivors],
    )
    for result in results:
        assert isinstance(result, (bytes, httpx.TransportError)), result
    assert eventually(lambda: server.metric("light_tts_llm_kv_slots_used") == 0, 2)
    # gunicorn starts another worker
    assert eventually(lambda: len(server.workers) == 2 and workers[0] not in server.workers, 10)


def serves_somebody(server, worker: psutil.Process) -> bool:
    connections = worker.net_connections(kind="tcp")
    return any(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == server.port for c in connections)


@pytest.mark.nightly
def test_a_stage_that_works_between_its_deaths_is_never_given_up(server):
    with server.client() as client:
        for _ in range(3):
            os.kill(stage_pid(server, "encode"), signal.SIGKILL)
            assert speak(client, "Still here.").status_code == 200
    server.wait_until_ready()
