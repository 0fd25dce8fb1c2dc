"""How many requests fail while the server is replaced by another one, over and over, on the same port.

    python test/takeover.py 1000

Starts servers of its own with the small checkpoint of the tests. Eight clients ask for short speech until so
many requests have been answered, four over a connection that they keep, four each time over a new one; as
soon as a server has ended, the one that replaced it is replaced. Counts, not times: the machine may be busy.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import time

import httpx
from support.server_process import Server, launch, start_server

CLIENTS = 8
FORM = {"tts_text": "Hello.", "spk_id": "tiny_spk", "min_new_tokens": "1", "max_new_tokens": "10"}


async def ask(url: str, number: int, left: list[int], found: collections.Counter[str]) -> None:
    """Requests until none is left to be made; `found` counts how they ended."""
    limits = httpx.Limits(max_keepalive_connections=number % 2)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        while left:
            left.pop()
            try:
                answer = await client.post("/inference_zero_shot", data=FORM)
                found[str(answer.status_code)] += 1
            except httpx.HTTPError as error:
                found[repr(error)] += 1


async def replaced(old: Server, stack: contextlib.ExitStack) -> Server:
    """The server that has taken the place of `old`, which has ended."""
    new = stack.enter_context(launch(wait=False, port=old.port, replace=True, httpserver_workers=2))
    while old.process.poll() is None:
        if new.process.poll() is not None:
            raise RuntimeError(f"the new server has ended:\n{new.output}")
        await asyncio.sleep(0.1)
    if old.process.returncode:
        raise RuntimeError(f"the old server ended with code {old.process.returncode}:\n{old.output}")
    return new


async def run(requests: int) -> None:
    found: collections.Counter[str] = collections.Counter()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(start_server(httpserver_workers=2))
        left = list(range(requests))
        began = time.monotonic()
        asking = [asyncio.create_task(ask(server.url, number, left, found)) for number in range(CLIENTS)]
        replacements = 0
        while left:
            server = await replaced(server, stack)
            replacements += 1
            print(f"{sum(found.values())} answered, {replacements} replacements: {dict(found)}", flush=True)
        await asyncio.gather(*asking)
    print(
        f"{requests} requests, {replacements} replacements, {requests - found['200']} failed: {dict(found)} "
        f"({time.monotonic() - began:.0f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Count requests that fail while servers are replaced.")
    parser.add_argument("requests", type=int, help="how many to make")
    asyncio.run(run(parser.parse_args().requests))


if __name__ == "__main__":
    main()
