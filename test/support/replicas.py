"""Two and more servers behind Ray Serve, for tests: `with start_replicas(2) as server: ...`"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from light_tts.scale.autoscaling import METRIC
from support.server_process import Server, launch

START_TIMEOUT = 280.0
TEXT = "The quick brown fox jumps over the lazy dog and runs away."
STREAM_TIMEOUT = 600.0


@contextlib.contextmanager
def start_replicas(count: int, **flags: object) -> Iterator[Server]:
    """`light-tts serve --ray COUNT`, with all replicas ready."""
    program = ("-m", "light_tts.cli", "serve", "--ray", str(count), "--ray_gpus", "0")
    with launch(program=program, timeout=START_TIMEOUT, **flags) as server:
        wait_for_servers(server, count)
        yield server


def audio_in_work(url: str) -> float:
    """Seconds of audio that the accepted requests of this server still wait for."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(METRIC))


def wait_for_servers(server: Server, count: int) -> None:
    """Wait until `count` replicas have a server that is ready, the proxy passes requests to each of them, and
    no other server is running."""
    end = time.monotonic() + START_TIMEOUT
    seen: set[str] = set()
    while time.monotonic() < end:
        with contextlib.suppress(httpx.HTTPError, psutil.Error):
            names = {replica_of(front) for front in fronts(server)}
            answer = httpx.get(f"{server.url}/readiness", timeout=30)
            seen = (seen | {answer.headers.get("x-replica", "")}) & names if answer.is_success else set()
            if len(names) == count and seen == names:
                return
        time.sleep(0.2)
    raise TimeoutError(f"there are not {count} ready servers after {START_TIMEOUT:g} s:\n{server.output}")


def fronts(server: Server) -> list[psutil.Process]:
    """The front process of each replica's server: its parent is the replica's process of Ray."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            ours = "light_tts.server.api_server" in line and str(server.directory / "voices") in line
            if ours and process.parent().cmdline() != line:
                found.append(process)
    return found


def urls(server: Server) -> list[str]:
    """Return the URLs of the replicas' own servers; the port is the last flag that a replica passes."""
    return [f"http://127.0.0.1:{front.cmdline()[-1]}" for front in fronts(server)]


def replica_of(front: psutil.Process) -> str:
    """Return the X-Replica of a server started with --log_dir: the name of its own log folder."""
    line = front.cmdline()
    last = len(line) - 1 - line[::-1].index("--log_dir")
    return Path(line[last + 1]).name


@dataclass
class Streams:
    """How streams ended, with the X-Replica of each: all of the audio came, it was cut off after audio had
    come, or a connection ended before any had come."""

    complete: list[str] = field(default_factory=list)
    cut_off: list[str] = field(default_factory=list)
    not_begun: int = 0
    refused: list[int] = field(default_factory=list)  # statuses
    sizes: list[int] = field(default_factory=list)  # bytes of each complete one

    def __str__(self) -> str:
        complete, cut_off, refused = Counter(self.complete), Counter(self.cut_off), Counter(self.refused)
        return (
            f"complete {dict(complete)}, cut off {dict(cut_off)}, ended before they began {self.not_begun}, "
            f"refused {dict(refused)}"
        )


def run_streams(
    server: Server,
    count: int,
    then: Callable[[], None],
    begun: int,
    voice: str = "tiny_spk",
    tokens: int = 100,
) -> Streams:
    """So many streams at once, of so many speech tokens each; `then` is called, in a thread, once so many
    have begun."""
    form = {"tts_text": TEXT, "spk_id": voice, "stream": "true"}
    form |= {"min_new_tokens": str(tokens), "max_new_tokens": str(tokens)}

    async def run() -> Streams:
        found, under_way = Streams(), [0]
        enough = asyncio.Event()

        async def speak(client: httpx.AsyncClient, number: int) -> None:
            size, replica = 0, ""
            try:
                fields = {**form, "seed": str(number)}
                async with client.stream("POST", "/inference_zero_shot", data=fields) as answer:
                    if answer.status_code != 200:
                        found.refused.append(answer.status_code)
                        return
                    replica = answer.headers["x-replica"]
                    async for piece in answer.aiter_raw():
                        under_way[0] += not size
                        size += len(piece)
                        if under_way[0] >= begun:
                            enough.set()
                found.complete.append(replica)
                found.sizes.append(size)
            except httpx.HTTPError:
                if size:
                    found.cut_off.append(replica)
                else:
                    found.not_begun += 1

        async with httpx.AsyncClient(base_url=server.url, timeout=STREAM_TIMEOUT) as client:
            tasks = [asyncio.create_task(speak(client, number)) for number in range(count)]
            await asyncio.wait_for(enough.wait(), STREAM_TIMEOUT)
            await asyncio.to_thread(then)
            await asyncio.gather(*tasks)
        return found

    return asyncio.run(run())
