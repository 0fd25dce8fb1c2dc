"""ModelNumbers: the parameters of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from light_tts.common.sampling_rule import SamplingRule


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
