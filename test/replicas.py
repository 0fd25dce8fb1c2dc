"""Figures of servers behind Ray Serve, started with the small checkpoint of the tests, or with --model_dir.

python test/replicas.py latency      overhead of the proxy and the replica
python test/replicas.py throughput   a server without Ray, then one and two replicas
python test/replicas.py kills        32 streams while a server, then a replica's process of Ray, is killed
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import httpx
from support.replicas import fronts, replica_of, run_streams, start_replicas, urls, wait_for_servers
from support.server_process import Server, start_server

from light_tts.tools.bench import figures
from light_tts.tools.bench.client import Outcome, open_session, speak
from light_tts.tools.bench.load import closed_loop
from light_tts.tools.bench.workload import TEXTS, Workload

CLIENTS = 8
TOKENS = 75  # of speech in each request: 3 s


def first_byte(client: httpx.Client, method: str, path: str, form: dict[str, str] | None = None) -> float:
    """Milliseconds to the first byte of the answer's body."""
    began = time.perf_counter()
    with client.stream(method, path, data=form) as answer:
        answer.raise_for_status()
        pieces = answer.iter_raw()
        next(pieces)
        took = (time.perf_counter() - began) * 1000
        for _ in pieces:
            pass
    return took


def latency(server: Server, voice: str, number: int) -> None:
    """Print latencies of alternating requests, direct and through the proxy, and of what is added."""
    speech = {"tts_text": "Hello.", "spk_id": voice, "stream": "true", "max_new_tokens": "40"}
    kinds = (("GET", "/liveness", None), ("POST", "/inference_zero_shot", speech))
    with server.client() as through, httpx.Client(base_url=urls(server)[0], timeout=120) as direct:
        for what in kinds:
            name, count = ("GET /liveness", number) if what[2] is None else ("first audio", number // 10)
            for client in (direct, through, through):  # both replicas have spoken before
                first_byte(client, *what)
            times = [(first_byte(direct, *what), first_byte(through, *what)) for _ in range(count)]
            columns = {
                "direct": [pair[0] for pair in times],
                "through the proxy": [pair[1] for pair in times],
                "difference of each pair": [pair[1] - pair[0] for pair in times],
            }
            for label, values in columns.items():
                found = figures.spread(values)
                print(f"{name}, {label}: P50 {found['p50']:.1f} ms, P95 {found['p95']:.1f} ms ({count})")


async def load(server: Server, voice: str, number: int) -> str:
    """Return the figures of `number` streams from CLIENTS clients that each send one after the other."""
    fields = {"stream": True, "spk_id": voice, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    workload = Workload(TEXTS, fields, None, 0, as_json=True)
    async with open_session(server.url, 600.0) as session:

        async def send(index: int, due: float) -> Outcome:
            return await speak(session, workload.body(index), index, due)

        await closed_loop(send, CLIENTS, number=CLIENTS)
        found = figures.summarize(await closed_loop(send, CLIENTS, number=number))
    first = found["first_audio"]
    return (
        f"{found['requests_per_second']:.2f} requests/s, {found['audio_seconds_per_second']:.2f} audio s/s, "
        f"first audio P50 {first['p50'] * 1000:.0f} ms, P95 {first['p95'] * 1000:.0f} ms "
        f"({found['succeeded']} of {found['requests']} complete)"
    )


def throughput(voice: str, number: int, **flags: object) -> None:
    setups: dict[str, Callable[[], AbstractContextManager[Server]]] = {
        "a server without Ray": partial(start_server, **flags),
        "1 replica": partial(start_replicas, 1, **flags),
        "2 replicas": partial(start_replicas, 2, **flags),
    }
    for name, start in setups.items():
        with start() as server:
            print(f"{name}: {asyncio.run(load(server, voice, number))}", flush=True)


def kills(server: Server, voice: str) -> None:
    for name in ("a server", "a replica's process of Ray"):
        wait_for_servers(server, 2)
        front = fronts(server)[0]
        victim = front.pid if name == "a server" else front.ppid()
        of = replica_of(front)
        found = run_streams(server, 32, partial(os.kill, victim, signal.SIGKILL), begun=8, voice=voice)
        print(f"{name} killed, of {of}: {found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("latency", "throughput", "kills"))
    parser.add_argument("--number", type=int, default=400, help="GETs of latency (a tenth as many streams)")
    parser.add_argument("--streams", type=int, default=64, help="of each setup of throughput")
    parser.add_argument("--model_dir", help="another checkpoint, as pretrained_models/light-tts-mini")
    parser.add_argument("--voice", default="tiny_spk", help="one of the checkpoint's, for example anna")
    args = parser.parse_args()
    flags: dict[str, object] = {"max_wait": 600}  # a slow machine refuses none
    if args.model_dir:
        flags["model_dir"] = os.path.abspath(args.model_dir)
    if args.what == "throughput":
        throughput(args.voice, args.streams, **flags)
        return
    with start_replicas(2, **flags) as server:
        if args.what == "latency":
            latency(server, args.voice, args.number)
        else:
            kills(server, args.voice)


if __name__ == "__main__":
    main()
