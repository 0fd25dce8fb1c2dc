"""ModelNumbers: the parameters of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from light_tts.common.sampling_rule import SamplingRule
from light_tts.models.checkpoint.config import MAX_FRAMES, CommonConfig


@dataclass(frozen=True)
class ModelNumbers:
    """The parameters of a checkpoint that stages need without loading its components.

    `samples_per_token`, `frames_per_token`: output samples and mel frames per speech token;
    `samples_per_frame`: output samples per mel frame; `chunk_tokens`: speech tokens per streaming chunk;
    `lookahead_tokens`: number of speech tokens after a chunk that the flow needs; `spoken_ids`: number of
    speech ids that the flow can speak, ids from here on are special; `max_speech_tokens`: maximum number of
    speech tokens the flow accepts at once, including the prompt's; `sampling`: default sampling parameters;
    `mix_ratio`: text ids and speech tokens per block in bistream mode.
    """

    sample_rate: int  # output sample rate in Hz
    samples_per_token: int
    frames_per_token: int
    samples_per_frame: int
    chunk_tokens: int
    lookahead_tokens: int
    spoken_ids: int
    max_speech_tokens: int
    sampling: SamplingRule
    mix_ratio: tuple[int, int]


def numbers_of(config: CommonConfig, lookahead_tokens: int, spoken_ids: int) -> ModelNumbers:
    """Return the numbers of a checkpoint, of which the last two are its flow's."""
    return ModelNumbers(
        sample_rate=config.sample_rate,
        samples_per_token=config.samples_per_token,
        frames_per_token=config.frames_per_token,
        samples_per_frame=config.samples_per_frame,
        chunk_tokens=config.chunk_size,
        lookahead_tokens=lookahead_tokens,
        spoken_ids=spoken_ids,
        max_speech_tokens=MAX_FRAMES // config.token_mel_ratio,
        sampling=config.llm.sampling,
        mix_ratio=config.llm.mix_ratio,
    )
