"""Generates speech from a checkpoint without a server: many lines, each with several sampling rules, in one
batch of the language model. The result is the same as the server's for the same request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from light_tts.common.prompt_features import PromptFeatures
from light_tts.common.sampling_rule import SamplingRule
from light_tts.engine.llm.engine import LLMEngine
from light_tts.engine.llm.one_shot import OneShot
from light_tts.engine.llm.options import EngineOptions
from light_tts.engine.llm.sequence import PartRequest
from light_tts.engine.speech.chunk_planner import Chunk
from light_tts.engine.speech.faded_vocoding import OVERLAP_FRAMES
from light_tts.engine.speech.token2wav import Token2Wav
from light_tts.engine.speech.work_item import SpeechState, Voice, WorkItem
from light_tts.models.family import load_family
from light_tts.models.flow.padded import PaddedFlow
from light_tts.models.frontend.spellers import wetext_spellers
from light_tts.models.llm.misreading import misreading
from light_tts.tools.evaluation.client import LONGEST, SHORTEST_LIMIT, TOKENS_PER_SECOND
from light_tts.tools.evaluation.endings import expected_seconds
from light_tts.tools.evaluation.lines import Line
from light_tts.tools.evaluation.sound import Sound, read_sound


def _draw(engine: LLMEngine, sequences: Sequence[OneShot]) -> None:
    """All of them to their ends."""
    while ready := [sequence for sequence in sequences if sequence.ready]:
        fed = ready[0].on_device  # prompts first, together; then single tokens
        batch = [sequence for sequence in ready if sequence.on_device == fed]
        engine.launch([(sequence, 1 if fed else sequence.pending) for sequence in batch])
        engine.collect()


def most_tokens(line: Line) -> int:
    """Return the number of speech tokens beyond which the speech is considered runaway."""
    return math.ceil(TOKENS_PER_SECOND * max(LONGEST * expected_seconds(line), SHORTEST_LIMIT))


class LocalSpeaker:
    """Computes in float32 on `device`. `redraw`: as a server with --redraw_misread. Raises CheckpointError or
    ConfigError naming the file."""

    def __init__(self, model_dir: Path, device: torch.device, redraw: bool = True) -> None:
        self._family, self._device = load_family(model_dir), device
        self.numbers = self._family.numbers
        self._frontend = self._family.load_frontend(wetext_spellers(), 1)
        self._lm = self._family.load_llm(model_dir / "llm.pt", device, torch.float32)
        self._prompts: dict[Path, PromptFeatures] = {}
        self._aligner = self._family.load_aligner(self._lm) if redraw else None

    @cached_property
    def _token2wav(self) -> Token2Wav:
        flow = PaddedFlow(self._family.read_flow().to(self._device))
        vocoder = self._family.load_vocoder(self._device, OVERLAP_FRAMES)()
        return Token2Wav(flow, vocoder, self.numbers, full_last_chunk=False, device=self._device)

    def tokens(self, wanted: Sequence[tuple[Line, SamplingRule, int]]) -> list[list[list[int]]]:
        """Return, for each (line, rule, seed), the speech tokens of its parts. Raises RequestError if a text
        cannot be spoken."""
        takes = [self._sequences(*take) for take in wanted]
        sequences = [sequence for parts in takes for sequence in parts]
        longest = max(len(sequence.inputs) + sequence.max_outputs for sequence in sequences)
        rules = [rule for _, rule, _ in wanted]
        options = EngineOptions(
            slots=len(sequences) * longest,
            rows=len(sequences),
            max_len=longest,
            window=max(rule.win_size for rule in rules),
            max_top_k=max(rule.top_k for rule in rules),
        )
        engine = LLMEngine(self._lm, options)
        _draw(engine, sequences)
        for sequence in (again := [sequence for sequence in sequences if self._misread(sequence)]):
            engine.release(sequence)
            sequence.retry_with_next_seed()
        _draw(engine, again)
        return [[part.outputs for part in parts] for parts in takes]

    def _misread(self, sequence: OneShot) -> bool:
        """Whether a server would draw it once more."""
        if self._aligner is None or len(sequence.outputs) == sequence.max_outputs:
            return False
        inputs = sequence.spoken_inputs
        text = inputs[sequence.text.start : sequence.text.stop]
        words = [count for _, count in self._frontend.words(text)]
        return (
            misreading(self._aligner(inputs, sequence.text, range(sequence.given, len(inputs)), words))
            is not None
        )

    def sound(self, line: Line, parts: Sequence[Sequence[int]], seed: int) -> Sound:
        """Return the audio of a line's tokens."""
        voice = Voice.of(self._prompt(line.prompt[0]), self._device)
        waves = []
        for part, tokens in enumerate(parts):
            chunk = Chunk(0, len(tokens), len(tokens), final=True)
            item = WorkItem(SpeechState(voice, seed, part), tokens, chunk, stream=False)
            waves += self._token2wav.speak([item])
        return Sound(torch.cat([torch.from_numpy(wave) for wave in waves]).numpy(), self.numbers.sample_rate)

    def _sequences(self, line: Line, rule: SamplingRule, seed: int) -> list[OneShot]:
        prompt_wav, said = line.prompt
        prompt_text = self._frontend.prompt_text(said)
        speech = self._prompt(prompt_wav).speech_token.tolist() if prompt_text.with_speech else []
        return [
            OneShot(
                PartRequest(
                    job=line.text,
                    part=part,
                    seed=seed,
                    ids=self._lm.ids,
                    limit=self._lm.backbone.max_position_embeddings,
                    prompt_text=prompt_text.ids,
                    prompt_speech=speech,
                    max_outputs=most_tokens(line),
                    sampling=rule,
                ),
                ids,
            )
            for part, ids in enumerate(self._frontend.split_text(line.text))
        ]

    def _prompt(self, recording: Path) -> PromptFeatures:
        if recording not in self._prompts:
            sound = read_sound(recording)
            self._prompts[recording] = self._frontend.features(sound.wave, sound.rate)
        return self._prompts[recording]
