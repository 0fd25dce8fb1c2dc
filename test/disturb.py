"""Kills or stops the stages of a server in turn under eight clients and prints what became of the requests.

python test/disturb.py --soak 90                                            kills
python test/disturb.py --signal STOP --count 16 --hang_timeout 5            hangs
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections import Counter

import httpx
import numpy as np
from support.server_process import Server, start_server
from support.streams import CLIENTS, Client, run_clients, stage_pid

STAGES = (("encode", 0), ("llm", 0), ("decode", 0), ("decode", 1))


async def disturb(server: Server, expected: list[np.ndarray], args: argparse.Namespace) -> Counter[str]:
    """How many requests ended with the expected audio, with other audio, and without all of it."""
    found: Counter[str] = Counter()
    over = asyncio.Event()

    async def speak(number: int) -> None:
        while not over.is_set():
            try:
                samples = np.frombuffer(await Client(server, number).run(), np.int16)
            except (httpx.HTTPError, AssertionError) as error:
                print(f"lost: {error!r}")
                found["lost"] += 1
                continue
            same = (
                len(samples) == len(expected[number])
                and np.abs(samples.astype(int) - expected[number]).max() <= 2
            )
            found["same" if same else "different"] += 1

    tasks = [asyncio.ensure_future(speak(number)) for number in range(CLIENTS)]
    await asyncio.sleep(args.soak)
    print(f"undisturbed: {dict(found)}, false alarms: {alarms(server)}")
    for turn in range(args.count):
        place = STAGES[turn % len(STAGES)]
        pid = await asyncio.to_thread(stage_pid, server, *place)
        os.kill(pid, signal.Signals[f"SIG{args.signal}"])
        while await asyncio.to_thread(stage_pid, server, *place) == pid:
            await asyncio.sleep(0.1)
        await asyncio.to_thread(server.wait_until_ready)
        await asyncio.sleep(args.every)
    over.set()
    await asyncio.gather(*tasks)
    return found


def alarms(server: Server) -> int:
    return server.output.count("shows no progress")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--soak", type=float, default=30.0, help="seconds before the first signal")
    parser.add_argument("--count", type=int, default=24, help="signals")
    parser.add_argument("--every", type=float, default=5.0, help="seconds from ready to the next")
    parser.add_argument("--signal", choices=("KILL", "STOP"), default="KILL")
    parser.add_argument("--hang_timeout", type=float, default=30.0, help="--hang_timeout_cpu of the server")
    args = parser.parse_args()
    flags = {"decode_process_num": 2, "httpserver_workers": 2, "hang_timeout_cpu": args.hang_timeout}
    with start_server(**flags) as server:
        found = asyncio.run(disturb(server, run_clients(server), args))
        print(f"{args.count} SIG{args.signal}: {dict(found)}, alarms: {alarms(server)}")


if __name__ == "__main__":
    main()
