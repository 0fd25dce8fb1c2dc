"""Mel spectrograms of the teacher's speech as the flow makes them, for the vocoder to learn from.

The flow begins in the middle of its path, at the teacher's mel with noise, and goes on in the checkpoint's
own steps, another recording of the speaker being the prompt. So pitch and timing are the teacher's, and the
errors are the flow's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from light_tts.models.checkpoint.config import Config
from light_tts.models.flow.cfm import fixed_noise
from light_tts.models.flow.flow import Flow, FlowShapes
from light_tts.models.flow.unet.estimator import EstimatorMasks
from training.checkpoint import training_file
from training.corpus.corpus import Corpus
from training.flow.items import Choice, Items, PairedSpeech
from training.loop import averaged_weights

ROW_TOKENS = 384  # prompt and speech
BATCH = 48
# Euler steps that are left out, half of the batches each: of four they begin at t 0.29 and 0.62.
LEFT_OUT = (0.5, 0.67)


@dataclass(frozen=True)
class FlowMels:
    """mel: (all frames, mels) float16, of each utterance where the corpus has its labels; start:
    (utterances,) int64, the first of its frames; made: (utterances,) int64, how many of them the flow made,
    from the first one on, 0 for none."""

    mel: Tensor
    start: Tensor
    made: Tensor

    def crops(self, index: Tensor, begin: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """index: (batch,) utterances; begin: (batch,) first frame of each crop, may be negative -> mel
        (batch, mels, frames) float32, and (batch,) bool, whether the flow made all of it. Nothing waits for
        the device."""
        place = begin[:, None] + torch.arange(frames, device=begin.device)
        flat = (self.start[index][:, None] + place).clamp(0, len(self.mel) - 1)
        whole = (begin >= 0) & (begin + frames <= self.made[index])
        return self.mel[flat].float().transpose(1, 2), whole


def load_flow(work: Path, config: Config, shapes: FlowShapes, device: torch.device) -> Flow:
    """The flow as it is trained so far. Raises FileNotFoundError without a training file."""
    flow = Flow(config.flow, shapes)
    flow.load_state_dict(averaged_weights(training_file(work, "flow"), "flow"))
    return flow.to(device).eval().requires_grad_(False)


def flow_mels(flow: Flow, work: Path, corpus: Corpus, config: Config) -> FlowMels:
    """Mels of all utterances of the corpus that have codes. Raises FileNotFoundError without any."""
    speech, numbers = PairedSpeech.of(corpus, work, config, ROW_TOKENS)
    mel = torch.zeros(len(corpus.labels.f0), config.mel.num_mels, dtype=torch.float16, device=corpus.device)
    made = torch.zeros_like(corpus.frames)
    draw, steps = np.random.default_rng(0), len(flow.decoder.steps)
    starts = corpus.label_start.tolist()
    for number, first in enumerate(range(0, len(speech), BATCH)):
        recordings = np.arange(first, min(first + BATCH, len(speech)))
        chosen = speech.pairs(recordings, draw)
        items = speech.items(chosen)
        left_out = round(steps * LEFT_OUT[number % len(LEFT_OUT)])
        spoken = finished(flow, items, left_out, streaming=number // len(LEFT_OUT) % 2 == 1)
        prompts = (flow.ratio * Choice(*chosen).first_size).tolist()
        ends = (flow.ratio * items.length).tolist()
        for row, recording in enumerate(recordings.tolist()):
            own = spoken[row, :, prompts[row] : ends[row]].T
            start = starts[numbers[recording]]
            mel[start : start + len(own)] = own
            made[numbers[recording]] = len(own)
    return FlowMels(mel, corpus.label_start, made)


@torch.no_grad()
def finished(flow: Flow, items: Items, left_out: int, streaming: bool) -> Tensor:
    """The mels (batch, mels, frames) float32 that come of the items' own ones with noise, when the first
    `left_out` Euler steps are not taken."""
    decoder, frames = flow.decoder, items.mel.shape[2]
    longest = items.token.shape[1]
    rows_streamed = torch.full_like(items.complete, streaming)
    features, length = flow.encode(items.token, items.length, rows_streamed, items.complete, longest)
    mu, speaker = flow.encoder_proj(features).transpose(1, 2), flow.speaker(items.embedding)
    chunk = torch.where(rows_streamed, decoder.chunk_size, frames)  # a row alone is padded, too
    masks = EstimatorMasks.build(length, frames, chunk, mu.dtype, copies=2)
    steps = decoder.steps[left_out:]
    begin = steps[0][0]
    noise = fixed_noise(mu.shape[1], mu.device)[:, :, :frames]
    x = (1 - begin) * noise + begin * items.mel
    return decoder.integrate(x, steps, masks, mu, speaker, items.known)
