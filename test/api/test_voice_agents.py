"""The unmodified speech services of two voice agent frameworks. Neither is installed for the tests by
default: pip install '.[agents]', Pipecat in a separate environment if its versions conflict."""

from __future__ import annotations

import asyncio

import pytest
from support.server_process import Server

TEXT = "Hello there, how are you today?"


@pytest.mark.parametrize("model", ["tts-1", "gpt-4o-mini-tts"])  # with the second one it requests events
@pytest.mark.parametrize("format", ["mp3", "pcm", "opus"])
def test_livekit(server: Server, model: str, format: str):
    openai = pytest.importorskip("livekit.plugins.openai")

    async def speak() -> float:
        service = openai.TTS(
            model=model, voice="ash", base_url=f"{server.url}/v1", api_key="none", response_format=format
        )
        async with service.synthesize(TEXT) as stream:
            length = sum([event.frame.duration async for event in stream])
        await service.aclose()
        return length

    assert asyncio.run(speak()) > 0.3


@pytest.mark.parametrize("name", ["openai", "elevenlabs"])
def test_pipecat(server: Server, name: str):
    pytest.importorskip("pipecat")
    from pipecat.frames import frames
    from pipecat.pipeline.pipeline import Pipeline
    from pipecat.pipeline.runner import PipelineRunner
    from pipecat.pipeline.task import PipelineParams, PipelineTask
    from pipecat.processors.frame_processor import FrameProcessor

    class Ear(FrameProcessor):
        def __init__(self) -> None:
            super().__init__()
            self.heard = 0
            self.stopped = asyncio.Event()

        async def process_frame(self, frame, direction) -> None:
            await super().process_frame(frame, direction)
            if isinstance(frame, frames.TTSAudioRawFrame):
                self.heard += len(frame.audio)
            elif isinstance(frame, frames.TTSStoppedFrame) and self.heard:
                self.stopped.set()
            await self.push_frame(frame, direction)

    def service():
        if name == "openai":
            from pipecat.services.openai.tts import OpenAITTSService

            return OpenAITTSService(base_url=f"{server.url}/v1", api_key="none", stop_frame_timeout_s=30)
        from pipecat.services.elevenlabs.tts import ElevenLabsTTSService

        return ElevenLabsTTSService(
            url=server.websocket_url, api_key="none", voice_id="tiny_spk", stop_frame_timeout_s=30
        )

    async def speak() -> int:
        ear = Ear()
        params = PipelineParams(audio_out_sample_rate=24000)
        task = PipelineTask(Pipeline([service(), ear]), params=params, idle_timeout_secs=None)

        async def talk() -> None:
            words = [frames.LLMTextFrame(f"{word} ") for word in TEXT.split()]
            await task.queue_frames(
                [frames.LLMFullResponseStartFrame(), *words, frames.LLMFullResponseEndFrame()]
            )
            await asyncio.wait_for(ear.stopped.wait(), 60)
            await task.queue_frame(frames.EndFrame())

        await asyncio.gather(PipelineRunner(handle_sigint=False).run(task), talk())
        return ear.heard

    assert asyncio.run(speak()) > 0.3 * 48_000
