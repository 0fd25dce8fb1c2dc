"""Figures of two servers behind Ray Serve, started with the small checkpoint of the tests.

python test/replicas.py latency     overhead of the proxy and the replica
python test/replicas.py kills       32 streams while a server, then a replica of Ray, is killed
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import time

import httpx
import psutil
from support.replicas import fronts, run_streams, start_replicas, urls
from support.server_process import Server

SPEECH = {"tts_text": "Hello.", "spk_id": "tiny_spk", "stream": "true", "max_new_tokens": "40"}


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


def latency(server: Server, number: int) -> None:
    """Print latencies of alternating requests, direct and through the proxy."""
    kinds = (("GET", "/liveness", None), ("POST", "/inference_zero_shot", SPEECH))
    with server.client() as through, httpx.Client(base_url=urls(server)[0], timeout=120) as direct:
        for what in kinds:
            name, count = ("GET /liveness", number) if what[2] is None else ("first audio", number // 10)
            times = [(first_byte(direct, *what), first_byte(through, *what)) for _ in range(count)]
            for label, values in zip(("direct", "through the proxy"), zip(*times, strict=True), strict=True):
                cuts = statistics.quantiles(values, n=20)
                print(f"{name}, {label}: P50 {cuts[9]:.1f} ms, P95 {cuts[18]:.1f} ms ({count})", flush=True)


def wait_for_two(server: Server) -> None:
    end = time.monotonic() + 280
    while time.monotonic() < end:
        with contextlib.suppress(httpx.HTTPError, psutil.Error):
            found = urls(server)
            if len(found) == 2 and all(httpx.get(f"{url}/readiness").is_success for url in found):
                return
        time.sleep(1)
    raise TimeoutError("there are not two replicas again")


def kills(server: Server) -> None:
    for name in ("a server", "a replica's process of Ray"):
        wait_for_two(server)
        front = fronts(server)[0]
        victim = front.pid if name == "a server" else front.ppid()
        found = run_streams(server, 32, lambda pid=victim: os.kill(pid, signal.SIGKILL), begun=8)
        print(f"{name} killed: {found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures of two servers behind Ray Serve.")
    parser.add_argument("what", choices=("latency", "kills"))
    parser.add_argument("--number", type=int, default=400, help="requests of each kind for the latency")
    args = parser.parse_args()
    with start_replicas(2) as server:
        wait_for_two(server)
        if args.what == "latency":
            latency(server, args.number)
        else:
            kills(server)


if __name__ == "__main__":
    main()
