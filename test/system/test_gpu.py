"""On a GPU: the decode stage's own kernels against the golden waves, and a real server that speaks for many
different voices at once. `python -m pytest -m gpu` runs these and the GPU tests of the other files."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
import torch
from support.server_process import PROMPT_TEXT, PROMPT_WAV, start_server

from light_tts.engine.speech.chunk_planner import ChunkPlanner
from light_tts.engine.speech.faded_vocoding import OVERLAP_FRAMES
from light_tts.engine.speech.token2wav import Token2Wav
from light_tts.engine.speech.work_item import Voice
from light_tts.models.family import load_family
from light_tts.models.flow_options import FlowOptions
from light_tts.tools.parity import Golden
from light_tts.tools.parity.token2wav import FILE, GROWN, golden_voice, stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.timeout(600),  # kernels are compiled at their first use
]
COSYVOICE2, COSYVOICE3 = (
    Golden(Path(__file__).parents[1] / "golden" / family) for family in ("cosyvoice2", "cosyvoice3")
)
DEVICE = torch.device("cuda")
VOICES = 16


@pytest.mark.parametrize(
    ("golden", "name", "grow", "memory"),
    [
        *((COSYVOICE2, "fixed_hop", False, memory) for memory in (0, 1 << 28)),
        *((COSYVOICE2, "grow_hop", True, memory) for memory in (0, 1 << 28)),
        *((COSYVOICE3, "fixed_hop", False, memory) for memory in (0, 1 << 28)),
    ],
)
def test_streams_are_the_golden_ones(golden, name, grow, memory):
    """Flow in float32; the vocoder multiplies in float16 in places. The goldens' own limit is 1e-2."""
    family = load_family(golden.checkpoint)
    options = FlowOptions(max_batch_size=2, gpu_memory=memory)
    new_flow = family.load_flow(DEVICE, torch.float32, options)
    vocoder = family.load_vocoder(DEVICE, OVERLAP_FRAMES)()
    arrays, numbers = golden.arrays(FILE), family.numbers
    with torch.cuda.stream(torch.cuda.Stream()):
        model = Token2Wav(new_flow(), vocoder, numbers, full_last_chunk=grow, device=DEVICE)
        voice = golden_voice(golden)
        voice = Voice(voice.speech_token, voice.mel.cuda(), voice.embedding.cuda())
        hop = numbers.chunk_tokens
        planner = ChunkPlanner(
            len(voice.speech_token), hop, numbers.lookahead_tokens, GROWN * hop if grow else hop
        )
        wave = np.concatenate(stream(model, voice, arrays["token"].tolist(), planner))
    error = np.abs(wave - arrays[f"{name}_wav"].ravel())
    print(f"{name}: max {error.max():.1e}, mean {error.mean():.1e}")
    assert error.max() < 1e-2 and error.mean() < 1e-3


def recording(number: int) -> bytes:
    """Another voice of another length: a piece of the golden recording at another pitch."""
    samples, rate = soundfile.read(PROMPT_WAV)
    length = int(rate * (1.5 + 0.12 * number))
    start = 600 * number
    file = io.BytesIO()
    soundfile.write(file, samples[start : start + length], 16000 + 700 * number, format="WAV")
    return file.getvalue()


async def speak(http: httpx.AsyncClient, number: int) -> np.ndarray:
    fields = {
        "tts_text": f"Voice {number} says " + "something of its own. " * (1 + number % 3),
        "prompt_text": PROMPT_TEXT,
        "seed": str(number),
        "stream": str(number % 2 == 0).lower(),
        "max_new_tokens": str(60 + 5 * number),
    }
    files = {"prompt_wav": ("prompt.wav", recording(number), "audio/wav")}
    response = await http.post("/inference_zero_shot", data=fields, files=files)
    assert response.status_code == 200, response.text
    return np.frombuffer(response.content, np.int16)


@pytest.mark.parametrize("memory", [0, "auto"])
@pytest.mark.parametrize("golden", [COSYVOICE2, COSYVOICE3])
def test_sixteen_voices_at_once_sound_as_each_does_alone(golden, memory):
    """Whole and streamed answers mixed, float32: the same tokens, so the same length, and the same samples
    within 400 of 32768, the goldens' limit (the phase of the vocoder sums up what rounding does to pitch)."""

    async def run(server) -> list[tuple[np.ndarray, np.ndarray]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            alone = [await speak(http, number) for number in range(VOICES)]
            together = await asyncio.gather(*(speak(http, number) for number in range(VOICES)))
        return list(zip(alone, together, strict=True))

    flags = {"device": "cuda", "data_type": "float32", "decode_max_batch_size": 4, "decode_paral_num": 2}
    flags["flow_memory_gpu_mb"] = memory
    flags["mps"] = "off"  # a daemon of its own would make others on this GPU take turns
    with start_server(timeout=500, model_dir=golden.checkpoint, **flags) as server:
        for number, (alone, together) in enumerate(asyncio.run(run(server))):
            assert len(alone) == len(together) > 0, f"voice {number}"
            error = np.abs(alone.astype(int) - together).max()
            print(f"voice {number}: {len(alone)} samples, largest difference {error}")
            assert error <= 400, f"voice {number}"
