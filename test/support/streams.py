"""Eight clients that stream from a server concurrently, and the processes of its stages."""

from __future__ import annotations

import asyncio
import time

import httpx
import numpy as np

from support.processes import find_below
from support.server_process import PROMPT_TEXT, PROMPT_WAV

CLIENTS = 8
TOKENS = 105
PATIENCE = 240  # seconds without data; a busy machine takes minutes to start a stage


def stage_pid(server, stage: str, index: int = 0) -> int:
    """Return the pid that runs this stage now; waits while it is being restarted."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for process in find_below(server.pid, "--stage", stage, "--index", str(index)):
            return process.pid
        time.sleep(0.1)
    raise AssertionError(f"no {stage} process {index}")


class Client:
    """One streaming request; `received` grows as audio arrives."""

    def __init__(self, server, number: int, stream: bool = True) -> None:
        self.fields = {
            "tts_text": f"Hello number {number}, how are you today? I am fine.",
            "prompt_text": PROMPT_TEXT,
            "stream": str(stream).lower(),
            "seed": str(1000 + number),
            "min_new_tokens": str(TOKENS),
            "max_new_tokens": str(TOKENS),
        }
        self.url = f"{server.url}/inference_zero_shot"
        self.received = bytearray()

    async def run(self) -> bytes:
        async with httpx.AsyncClient(timeout=PATIENCE, verify=False) as http:
            files = {"prompt_wav": ("prompt.wav", PROMPT_WAV.read_bytes(), "audio/wav")}
            async with http.stream("POST", self.url, data=self.fields, files=files) as response:
                assert response.status_code == 200, await response.aread()
                async for piece in response.aiter_raw():
                    self.received += piece
        return bytes(self.received)


def run_clients(server, disturb=None, stream: bool = True) -> list[np.ndarray]:
    """Return the samples of all clients. `disturb(clients)` runs in parallel."""

    async def run() -> list[bytes]:
        clients = [Client(server, number, stream) for number in range(CLIENTS)]
        tasks = [asyncio.ensure_future(client.run()) for client in clients]
        if disturb is not None:
            await disturb(clients)
        return await asyncio.gather(*tasks)

    return [np.frombuffer(pcm, np.int16) for pcm in asyncio.run(run())]


def assert_same_audio(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for number, (samples, reference) in enumerate(zip(got, expected, strict=True)):
        assert len(samples) == len(reference), f"client {number}"
        error = np.abs(samples.astype(int) - reference.astype(int)).max()
        assert error <= 2, f"client {number} differs by {error} of 32768"
