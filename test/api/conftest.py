"""One server for all tests of this folder."""

from __future__ import annotations

import io
from collections.abc import Iterator

import av
import numpy as np
import openai
import pytest
from server_process import Server, start_server


@pytest.fixture(scope="session")
def api() -> Iterator[Server]:
    with start_server(httpserver_workers=2) as running:
        yield running


@pytest.fixture(scope="session")
def client(api: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0, timeout=60) as sdk:
        yield sdk


def decode(audio: bytes) -> tuple[np.ndarray, int]:
    """Every sample of a sound file of any format, (n,) float32 mono, and its rate. Raises where any of it
    cannot be decoded."""
    with av.open(io.BytesIO(audio)) as file:
        to_float = av.AudioResampler(format="flt", layout="mono")
        frames = [part for frame in file.decode(audio=0) for part in to_float.resample(frame)]
        frames += to_float.resample(None)
        return np.concatenate([frame.to_ndarray()[0] for frame in frames]), frames[0].sample_rate


def seconds(audio: bytes) -> float:
    samples, rate = decode(audio)
    return len(samples) / rate
