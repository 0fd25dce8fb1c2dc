"""After 200 requests the server holds what it held after 20: memory, open files, shared memory."""

import asyncio
from pathlib import Path

import httpx
import psutil
import pytest
from server_process import PROMPT_TEXT, PROMPT_WAV, start_server

GROWTH_MB = 12  # allocators settle for a while; 180 leaked prompts or waves would be far more


def held(server) -> dict[str, float]:
    """Private memory (MB), open files and shared-memory files of all processes of the server."""
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    shared = [path for path in Path("/dev/shm").glob(f"light_tts-{server.port}-*/*")]
    return {
        "memory": sum(process.memory_full_info().uss for process in processes) / 2**20,
        "files": sum(process.num_fds() for process in processes),
        "segments": len(shared),
    }


async def speak(server, count: int) -> None:
    """`count` requests, four at a time: whole and streamed, and every fifth client leaves early."""
    places = asyncio.Semaphore(4)

    async def one(http: httpx.AsyncClient, number: int) -> None:
        fields = {
            "tts_text": "Hello there, how are you?",
            "prompt_text": PROMPT_TEXT,
            "stream": str(number % 2 == 0).lower(),
            "seed": str(number),
            "min_new_tokens": "40",
            "max_new_tokens": "40",
        }
        files = {"prompt_wav": ("prompt.wav", PROMPT_WAV.read_bytes(), "audio/wav")}
        url = f"{server.url}/inference_zero_shot"
        async with places, http.stream("POST", url, data=fields, files=files) as response:
            assert response.status_code == 200, await response.aread()
            if number % 5 == 0:
                return
            received = sum([len(piece) async for piece in response.aiter_raw()])
        assert received == 40 * 960 * 2

    async with httpx.AsyncClient(timeout=120) as http:
        await asyncio.gather(*(one(http, number) for number in range(count)))


@pytest.mark.timeout(600)
def test_two_hundred_requests_hold_no_more_than_twenty():
    with start_server(decode_process_num=2, httpserver_workers=2) as server:
        asyncio.run(speak(server, 20))
        before = held(server)
        asyncio.run(speak(server, 180))
        after = held(server)
    print(before, after)
    assert after["segments"] == before["segments"]
    assert after["files"] <= before["files"] + 4  # keep-alive connections come and go
    assert after["memory"] <= before["memory"] + GROWTH_MB
