"""Two and more servers behind Ray Serve, for tests: `with start_replicas(2) as server: ...`"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import psutil

from support.server_process import Server, launch

START_TIMEOUT = 280.0
TEXT = "The quick brown fox jumps over the lazy dog and runs away."
STREAM_TIMEOUT = 600.0


@contextlib.contextmanager
def start_replicas(count: int, **flags: object) -> Iterator[Server]:
    """`light-tts serve --ray COUNT`, ready."""
    program = ("-m", "light_tts.cli", "serve", "--ray", str(count), "--ray_gpus", "0")
    with launch(program=program, timeout=START_TIMEOUT, **flags) as server:
        yield server


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


@dataclass
class Streams:
    """How streams ended that were under way when something was killed. `begun`, of those: audio had come."""

    complete: int = 0
    broken_begun: int = 0
    broken_not_begun: int = 0
    refused: list[int] = field(default_factory=list)  # statuses
    sizes: list[int] = field(default_factory=list)  # bytes of each


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
            size = 0
            try:
                fields = {**form, "seed": str(number)}
                async with client.stream("POST", "/inference_zero_shot", data=fields) as answer:
                    if answer.status_code != 200:
                        found.refused.append(answer.status_code)
                        return
                    async for piece in answer.aiter_raw():
                        under_way[0] += not size
                        size += len(piece)
                        if under_way[0] >= begun:
                            enough.set()
                found.complete += 1
                found.sizes.append(size)
            except httpx.HTTPError:
                if size:
                    found.broken_begun += 1
                else:
                    found.broken_not_begun += 1

        async with httpx.AsyncClient(base_url=server.url, timeout=STREAM_TIMEOUT) as client:
            tasks = [asyncio.create_task(speak(client, number)) for number in range(count)]
            await asyncio.wait_for(enough.wait(), STREAM_TIMEOUT)
            await asyncio.to_thread(then)
            await asyncio.gather(*tasks)
        return found

    return asyncio.run(run())
