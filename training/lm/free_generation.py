"""Speaks held-out sentences with the language model and counts errors, to select weights and sampling
parameters.

    python -m training.lm.free_generation [--sentences 240] [--grid] [--work build/train_mini]

Uses the weights that would be exported. Input and sampling are the same as in the server
(engine/llm/sequence.py, common/sampling.py), in one batch. With `--grid`, evaluates many sampling settings.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from light_tts.common.row_state import BANNED, HELD
from light_tts.common.sampling import SamplingRules, ban
from light_tts.common.sampling import draw as draw_tokens
from light_tts.common.sampling_rule import SamplingRule
from light_tts.engine.llm.bistream import Bistream
from light_tts.engine.llm.one_shot import OneShot
from light_tts.engine.llm.row_states import latest_outputs
from light_tts.engine.llm.sequence import PartRequest
from light_tts.engine.llm.sequence import Sequence as Part
from light_tts.models.checkpoint.cosyvoice2_config import Config
from light_tts.models.llm.speech_lm import Qwen2Config, SpeechLM
from training.checkpoint import write_config
from training.corpus.packages import phoneme_ids
from training.devices import training_device
from training.lm.data import Texts
from training.lm.recognised import Faults, Recogniser, Reference, faults
from training.lm.weights import weights_to_use
from training.loop import averaged_weights
from training.work import argument_parser

LIMIT = 1024  # maximum ids of a sentence with its prompt and speech: a training row
EVERYDAY = 0.5  # fraction of the sentences
LONGEST_PROMPT = 200  # speech tokens
GRID = {"top_p": (0.4, 0.5, 0.6, 0.8), "top_k": (8, 25), "tau_r": (0.1, 0.2, 0.3)}


class Cache:
    """Attention of a batch of rows with a KV cache. An `AttentionContext`."""

    def __init__(self, backbone: Qwen2Config, rows: int, device: torch.device) -> None:
        # one extra position for padding
        shape = (backbone.num_hidden_layers, rows, LIMIT + 1, backbone.num_key_value_heads, backbone.head_dim)
        self._keys, self._values = (torch.zeros(shape, device=device) for _ in range(2))

    def begin(self, rows: Tensor, positions: Tensor, length: int) -> None:
        """Prepare the next step: rows: (batch,); positions: (batch, n), LIMIT for padding; length: number of
        used positions after it."""
        self._rows, self._positions, self._length = rows, positions, length
        places = torch.arange(length, device=rows.device)
        self._seen = (places <= positions[..., None])[:, None]  # (batch, 1, n, length)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape, rows = self._positions.shape, self._rows
        for kept, new in ((self._keys, k), (self._values, v)):
            kept[layer].index_put_((rows[:, None], self._positions), new.unflatten(0, shape))
        keys, values = (
            kept[layer][rows, : self._length].repeat_interleave(q.shape[1] // k.shape[1], 2).transpose(1, 2)
            for kept in (self._keys, self._values)
        )
        q = q.unflatten(0, shape).transpose(1, 2)
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, keys, values, self._seen)
        return out.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def speak(lm: SpeechLM, parts: Sequence[Part], sampling: SamplingRule, device: torch.device) -> None:
    """Generate all `parts` to their end, in one batch."""
    table, ids = torch.cat(lm.tables), lm.ids
    cache = Cache(lm.backbone, len(parts), device)
    while live := [(row, part) for row, part in enumerate(parts) if part.ready]:
        size = max(part.pending for _, part in live)
        inputs = np.zeros((len(live), size), np.int64)
        positions = np.full((len(live), size), LIMIT)
        for line, (_, part) in enumerate(live):
            inputs[line, : part.pending] = part.inputs[part.cached :]
            positions[line, : part.pending] = np.arange(part.cached, len(part.inputs))
        rows, inputs, positions, last, banned, history, seeds, steps = (
            torch.from_numpy(np.array(values)).to(device)
            for values in (
                [row for row, _ in live],
                inputs,
                positions,
                [part.pending - 1 for _, part in live],
                [_banned(part) for _, part in live],
                [latest_outputs(part, sampling.win_size) for _, part in live],
                [part.seed for _, part in live],
                [len(part.outputs) for _, part in live],
            )
        )
        cache.begin(rows, positions, max(len(part.inputs) for _, part in live))
        hidden = lm.hidden(F.embedding(inputs.flatten(), table), positions.flatten(), cache)
        hidden = hidden.unflatten(0, inputs.shape)[torch.arange(len(live), device=device), last]
        scores = ban(lm.logits(hidden), ids.speech_tokens, banned)
        rules = SamplingRules.of([sampling] * len(live), device)
        drawn = draw_tokens(scores, rules, history, seeds, torch.zeros_like(seeds), steps).tolist()
        for (_, part), token in zip(live, drawn, strict=True):
            part.cached = len(part.inputs)
            part.accept(token)


def _banned(part: Part) -> list[bool]:
    """Return which special ids must not be sampled now."""
    early = len(part.outputs) < part.min_outputs
    return [ban == BANNED or (ban == HELD and early) for ban in part.bans]


@dataclass(frozen=True)
class Question:
    """A sentence to be spoken after a prompt."""

    prompt_text: list[int]
    prompt_speech: list[int]
    text: list[int]
    reference: Reference


@dataclass(frozen=True)
class Found:
    """The errors of generated speech. errors: share of phonemes; missing, extra: a word of the text; ended:
    share that ended by themselves."""

    errors: float
    missing: float
    extra: float
    ended: float
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.errors:.2%} of phonemes wrong; for each 100 words {100 * self.missing:.2f} missing, "
            f"{100 * self.extra:.2f} stretches too many; {self.ended:.1%} ended ({self.seconds:.1f} s)"
        )


def summed(found: list[Faults], ended: float) -> Found:
    phonemes, words = sum(f.phonemes for f in found), sum(f.words for f in found)
    errors, missing, extra = (sum(getattr(f, name) for f in found) for name in ("errors", "missing", "extra"))
    return Found(errors / phonemes, missing / words, extra / words, ended)


class Examination:
    """A fixed set of English held-out sentences with held-out voices."""

    def __init__(
        self,
        work: Path,
        texts: Texts,
        config: Config,
        backbone: Qwen2Config,
        device: torch.device,
        sentences: int,
    ) -> None:
        """Raises FileNotFoundError without held-out speech."""
        self._config, self._device = config, device
        self._lm = SpeechLM(backbone, config.llm).to(device).eval().requires_grad_(False)
        self._recognise, ids = Recogniser(work, device), phoneme_ids(work)
        draw = random.Random(0)
        prompts = [spoken for voice in texts.voices("test", mandarin=False) for spoken in voice]
        prompts = [spoken for spoken in prompts if len(spoken.speech) <= LONGEST_PROMPT] or prompts
        lines = texts.sentences("test")
        everyday = [line for line in lines if line["source"] == "everyday"]
        others = [line for line in lines if line["source"] == "examples"]
        count = min(len(everyday), round(EVERYDAY * sentences))
        chosen = draw.sample(everyday, count) + draw.sample(others, min(len(others), sentences - count))
        self._questions = []
        for line in chosen:
            prompt, (text, _) = draw.choice(prompts), texts.read(line)
            reference = Reference.of(line["phonemes"], ids)
            self._questions.append(
                Question(prompt.text.tolist(), prompt.speech.tolist(), text.tolist(), reference)
            )

    def examine(
        self,
        weights: Mapping[str, Tensor],
        sampling: SamplingRule | None = None,
        streams: bool = False,
        seed: int = 0,
    ) -> Found:
        """Return the errors of speech generated by `weights`, of a `TrainedLM`, with the sampling of
        the checkpoint unless given; `streams`: bistream."""
        begun = time.monotonic()
        own = {name.removeprefix("lm."): value for name, value in weights.items() if name.startswith("lm.")}
        self._lm.load_state_dict(own)
        parts = [self._part(number, streams, seed) for number in range(len(self._questions))]
        speak(self._lm, parts, sampling or self._config.llm.sampling, self._device)
        spoken = [
            np.array([token for token in part.outputs if token < self._lm.ids.speech_tokens], np.int64)
            for part in parts
        ]
        heard = self._recognise(spoken)
        found = [faults(q.reference, said) for q, said in zip(self._questions, heard, strict=True)]
        ended = [part.error is None and len(part.outputs) < part.max_outputs for part in parts]
        return replace(summed(found, float(np.mean(ended))), seconds=time.monotonic() - begun)

    def _part(self, number: int, streams: bool, seed: int) -> Part:
        question, ids = self._questions[number], self._lm.ids
        job, seed = str(number), 1000 * seed + number
        asked = PartRequest(job, 0, seed, ids, LIMIT, question.prompt_text, question.prompt_speech)
        if not streams:
            return OneShot(asked, question.text)
        part = Bistream(asked, self._config.llm.mix_ratio)
        part.append_text(question.text)
        part.finish_text()
        return part

    def over_grid(self, weights: Mapping[str, Tensor], seeds: int = 2) -> str:
        """Return a table of sampling settings, the best first."""
        usual = self._config.llm.sampling
        lines = []
        for values in itertools.product(*GRID.values()):
            sampling = replace(usual, **dict(zip(GRID, values, strict=True)))
            found = [self.examine(weights, sampling, seed=seed) for seed in range(seeds)]
            mean = Found(*np.mean([astuple(one) for one in found], 0))
            lines.append((mean.errors, f"top_p {values[0]}, top_k {values[1]:2}, tau_r {values[2]}: {mean}"))
        return "\n".join(line for _, line in sorted(lines))


def recorded_errors(work: Path, texts: Texts, device: torch.device) -> Found:
    """Return the errors recognised in the speech tokens of held-out recordings, a lower bound of the
    measurement."""
    recognise, ids = Recogniser(work, device), phoneme_ids(work)
    lines, spoken = texts.spoken_lines("test")
    heard = recognise(spoken)
    found = [faults(Reference.of(p["phonemes"], ids), said) for p, said in zip(lines, heard, strict=True)]
    return summed(found, 1.0)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--sentences", type=int, default=240, help="to speak")
    parser.add_argument("--grid", action="store_true", help="try many settings of sampling")
    args = parser.parse_args()
    device = training_device()
    config, backbone, _ = write_config(args.work)
    texts = Texts(args.work, None)
    print(f"recordings: {recorded_errors(args.work, texts, device)}", flush=True)
    examination = Examination(args.work, texts, config, backbone, device, args.sentences)
    weights = averaged_weights(weights_to_use(args.work))
    for streams in (False, True):
        found = examination.examine(weights, streams=streams)
        print(f"{'bistream' if streams else 'at once'}: {found}", flush=True)
    if args.grid:
        print(examination.over_grid(weights), flush=True)


if __name__ == "__main__":
    main()
