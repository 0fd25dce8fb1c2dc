"""Trains the language model: text to speech tokens, and, so that it knows how words are pronounced that are
rarely or never spoken in the data, text to the teacher's phonemes.

    python scripts/train_mini/language_model.py [--minutes 5] [--total 5] [--work build/train_mini]

Needs the text tokenizer (text_tokenizer.py) and the speech tokens (codes.npz). Writes llm.pt into the
checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from checkpoint import checkpoint_folder, training_file, write_config, write_weights
from codes import read_codes
from corpus import SILENCE
from devices import mixed_precision, sent, training_device
from layouts import NONE, Layout, Spoken, bistream, can_bistream, joined, one_shot, pronunciation
from packages import phoneme_ids
from packing import ROW, batches, packed, prefetched
from text_tokenizer import spoken_texts
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import Learner, averaged_weights, train, training_parser
from work import read_lines

from light_tts.models.cosyvoice2.frontend.tokenizer import TextTokenizer
from light_tts.models.cosyvoice2.llm import SpeechIds, SpeechLM

NAME = "language_model"
ROWS = 16  # of a batch
TOKEN_RATE = 25  # speech tokens a second
PARTS = (0.3, 0.6, 0.1)  # shares of sequences of one, two and three utterances
BISTREAM = 0.25  # share of sequences of speech
PRONUNCIATION = 0.3  # share of tokens in sequences of phonemes
DROPOUT = 0.1
NOISE = 0.05  # share of speech tokens that are read wrong: the model's own will be, too
PHONEME_WEIGHT = 0.5
RATE = 1.5e-3

Encode = Callable[[str], list[int]]


class Packed:
    """Attention in rows of sequences, one behind the other. sequence: (rows, n), the number of each token's
    sequence. An `AttentionContext` without a cache."""

    def __init__(self, sequence: Tensor, dtype: torch.dtype) -> None:
        self._rows, size = sequence.shape
        past = torch.ones(size, size, dtype=torch.bool, device=sequence.device).tril()
        seen = past & (sequence[:, None, :, None] == sequence[:, None, None, :])
        self._bias = torch.zeros(seen.shape, dtype=dtype, device=sequence.device)
        self._bias.masked_fill_(~seen, -math.inf)  # (rows, 1, n, n)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[1]
        q, k, v = (self._by_head(x, heads) for x in (q, k, v))
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(q, k, v, self._bias)
        return out.transpose(1, 2).flatten(0, 1)

    def _by_head(self, x: Tensor, heads: int) -> Tensor:
        """(rows * n, kv_heads, head_dim) -> (rows, heads, n, head_dim)"""
        x = x[:, :, None].expand(-1, -1, heads // x.shape[1], -1).flatten(1, 2)
        return x.unflatten(0, (self._rows, -1)).transpose(1, 2).to(self._bias.dtype)


class TrainedLM(nn.Module):
    """`lm` and, for the time of training, what it needs to read and say phonemes."""

    def __init__(self, lm: SpeechLM, phonemes: int) -> None:
        super().__init__()
        self.lm = lm
        self.phoneme_embedding = nn.Embedding(phonemes, lm.backbone.hidden_size)
        self.phoneme_decoder = nn.Linear(lm.backbone.hidden_size, phonemes)
        self.dropout = nn.Dropout(DROPOUT)
        backbone = lm.llm.model
        backbone.lm_head.weight = backbone.model.embed_tokens.weight
        for layer in backbone.model.layers:
            layer.dropout.p = DROPOUT
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """As GPT-2 begins: what is added to the residual stream is smaller the more layers add to it."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(
                    std=0.02 / math.sqrt(2 * self.lm.backbone.num_hidden_layers) if adds else 0.02
                )

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """batch: (5, rows, n) of `packed` -> logits of speech ids and of phonemes, (rows * n, ...) float32"""
        inputs, positions, sequence = batch[:3]
        on_gpu = batch.is_cuda
        with mixed_precision(batch.device):
            inputs = inputs.flatten()
            if self.training:
                inputs = with_noise(inputs, self.lm.ids)
            table = torch.cat([*self.lm.tables, self.phoneme_embedding.weight])
            attention = Packed(sequence, torch.bfloat16 if on_gpu else torch.float32)
            x = self.dropout(F.embedding(inputs, table))
            hidden = self.lm.hidden(x, positions.flatten(), attention)
            return self.lm.logits(hidden), self.phoneme_decoder(hidden).float()


def with_noise(inputs: Tensor, ids: SpeechIds) -> Tensor:
    """Some speech tokens replaced by any other. inputs: (tokens,) unified ids."""
    first, end = ids.text_vocab, ids.text_vocab + ids.speech_tokens
    other = torch.randint_like(inputs, first, end)
    wrong = (inputs >= first) & (inputs < end) & (torch.rand(inputs.shape, device=inputs.device) < NOISE)
    return torch.where(wrong, other, inputs)


def training_step(model: TrainedLM, learner: Learner, batch: Tensor) -> dict[str, Tensor]:
    """One step, which may be recorded. batch: (5, rows, n) of `packed`."""
    logits = model(batch)
    targets = batch[3:].flatten(1).long()
    speech, phoneme = (_mean_loss(logit, target) for logit, target in zip(logits, targets, strict=True))
    norm = learner.learn(speech + PHONEME_WEIGHT * phoneme)
    return {"speech": speech.detach(), "phoneme": phoneme.detach(), "gradient": norm}


def _mean_loss(logits: Tensor, target: Tensor) -> Tensor:
    total = F.cross_entropy(logits, target, ignore_index=NONE, reduction="sum")
    return total / (target != NONE).sum().clamp(min=1)


class Texts:
    """Sequences of text and speech, and of text and phonemes, out of the work folder."""

    def __init__(self, work: Path, shards: int | None) -> None:
        """Raises FileNotFoundError for a step that was left out."""
        self._work, self._shards = work, shards
        self._encode: Encode = TextTokenizer(checkpoint_folder(work)).encode
        self._spoken = spoken_texts(work)
        self._phonemes = phoneme_ids(work)
        self.phonemes = max(self._phonemes.values()) + 1

    def _text(self, written: str) -> np.ndarray:
        return np.array(self._encode(self._spoken.get(written, written)), np.int64)

    def _sounds(self, phonemes: str) -> np.ndarray:
        return np.array([self._phonemes[phoneme] for phoneme in phonemes], np.int64)

    def pronunciations(self, split: str, ids: SpeechIds) -> list[Layout]:
        """Of all sentences, spoken or not."""
        return [
            pronunciation(self._text(line["text"]), self._sounds(line["phonemes"]), ids)
            for line in read_lines(self._work / "sentences.jsonl")
            if line["split"] == split
        ]

    def voices(self, split: str) -> list[list[Spoken]]:
        """What each speaker says, of the utterances that have been spoken and have speech tokens."""
        codes = read_codes(self._work)
        lines = {u["id"]: u for u in read_lines(self._work / "utterances.jsonl") if u["split"] == split}
        voices: dict[str, list[Spoken]] = {}
        for file in sorted((self._work / "speech").glob("?????.npz"))[: self._shards]:
            with np.load(file) as shard:
                names, durations = shard["id"], shard["durations"]
                durations = np.split(durations, np.cumsum(shard["phonemes"])[:-1])
            for name, seconds in zip(map(str, names), durations, strict=True):
                if name in lines and name in codes:
                    line, speech = lines[name], codes[name].speech_token
                    sounds = np.pad(self._sounds(line["phonemes"]), 1, constant_values=SILENCE)
                    spoken = Spoken(self._text(line["text"]), speech, heard(sounds, seconds, len(speech)))
                    voices.setdefault(line["speaker"], []).append(spoken)
        if not voices:
            raise FileNotFoundError(f"{self._work}: no speech tokens of split {split!r}")
        return list(voices.values())


def heard(phonemes: np.ndarray, durations: np.ndarray, tokens: int) -> np.ndarray:
    """phonemes, durations: (n,), seconds -> (tokens,) the phoneme in the middle of each speech token."""
    middles = (np.arange(tokens) + 0.5) / TOKEN_RATE
    return phonemes[np.searchsorted(np.cumsum(durations), middles).clip(max=len(phonemes) - 1)]


def training_layouts(
    voices: list[list[Spoken]],
    pronunciations: list[Layout],
    ids: SpeechIds,
    mix: tuple[int, int],
    draw: np.random.Generator,
) -> Iterator[Layout]:
    """Endless, in the shares that are given above. Sequences of several utterances are of one voice, as a
    prompt and what is said after it."""
    by_utterance = [voice for voice in voices for _ in voice]
    more_than = np.cumsum(PARTS)[:-1]
    tokens = told = 0
    while True:
        if told <= PRONUNCIATION * tokens:
            layout = pronunciations[draw.integers(len(pronunciations))]
            told += len(layout)
        else:
            voice = by_utterance[draw.integers(len(by_utterance))]
            count = min(len(voice), 1 + int((draw.random() > more_than).sum()))
            parts = [voice[number] for number in draw.choice(len(voice), count, replace=False)]
            while len(parts) > 1 and not fits(parts):
                parts.pop()
            layout = speech_layout(joined(parts), ids, mix, draw.random() < BISTREAM)
        tokens += len(layout)
        yield layout


def fits(parts: list[Spoken]) -> bool:
    """Whether a row has room for them, marks and what bistream repeats included."""
    return sum(len(part.text) + len(part.speech) for part in parts) + 3 <= ROW


def speech_layout(spoken: Spoken, ids: SpeechIds, mix: tuple[int, int], streams: bool) -> Layout:
    if streams and can_bistream(spoken, mix):
        return bistream(spoken, ids, mix)
    return one_shot(spoken, ids)


@torch.no_grad()
def measured(
    model: TrainedLM, layouts: list[Layout], device: torch.device, rows: int = ROWS
) -> dict[str, float]:
    """Over all `layouts`: nats and accuracy of speech tokens, of the end, of the fill id, and of phonemes;
    without those that are not there."""
    ids = model.lm.ids
    sums: dict[str, Tensor] = {}
    while layouts:
        batch, layouts = packed(layouts, rows)
        batch = torch.from_numpy(batch).to(device)
        for kind, logits, target in zip(
            ("speech", "phoneme"), model(batch), batch[3:].flatten(1).long(), strict=True
        ):
            nats = F.cross_entropy(logits, target.clamp(min=0), reduction="none")
            right = logits.argmax(-1) == target
            kinds = {kind: target >= 0}
            if kind == "speech":
                spoken = (target >= 0) & (target < ids.speech_tokens)
                kinds = {kind: spoken, "end": target == ids.eos, "fill": target == ids.fill}
            for name, where in kinds.items():
                values = torch.stack([where.sum(), nats[where].sum(), right[where].sum()]).cpu()
                sums[name] = sums.get(name, 0) + values
    found = {name: values.tolist() for name, values in sums.items() if values[0]}
    nats = {f"{name}_nats": total / count for name, (count, total, _) in found.items()}
    return {**nats, **{f"{name}_accuracy": right / count for name, (count, _, right) in found.items()}}


def export(work: Path) -> Path:
    """Writes llm.pt, in half precision and under the names of CosyVoice2, into the checkpoint."""
    weights = averaged_weights(training_file(work, NAME))
    state = {name.removeprefix("lm."): value for name, value in weights.items() if name.startswith("lm.")}
    tied = {"llm.model.lm_head.weight": state["llm.model.model.embed_tokens.weight"]}
    return write_weights(checkpoint_folder(work) / "llm.pt", state | tied)


def main() -> None:
    args = training_parser(__doc__, minutes=5.0).parse_args()
    device = training_device()
    config, backbone, _ = write_config(args.work)
    mix = config.llm.mix_ratio
    texts = Texts(args.work, args.shards)
    model = TrainedLM(SpeechLM(backbone, config.llm), texts.phonemes).to(device)
    learner, ids = Learner(model, RATE, weight_decay=0.05), model.lm.ids
    voices, pronunciations = texts.voices("train"), texts.pronunciations("train", ids)
    tokens = sum(len(spoken.speech) for voice in voices for spoken in voice)
    print(f"{tokens} speech tokens of {len(voices)} speakers, {len(pronunciations)} sentences", flush=True)
    layouts = training_layouts(voices, pronunciations, ids, mix, np.random.default_rng())
    take = prefetched(batches(layouts, ROWS))

    def draw() -> list[Tensor]:
        return [sent(torch.from_numpy(take()), device)]

    def check() -> str:
        """On speakers and sentences that nothing was trained on; each utterance has another as its prompt,
        where its speaker has one."""
        model.load_state_dict({k: v.to(device) for k, v in averaged_weights(path).items()})
        model.eval()
        parts = [
            [voice[number - 1], spoken] if len(voice) > 1 else [spoken]
            for voice in texts.voices("test")
            for number, spoken in enumerate(voice)
        ]
        held_out = [joined(some) for some in parts if fits(some)]
        groups = {
            "at once": [one_shot(spoken, ids) for spoken in held_out],
            "bistream": [bistream(spoken, ids, mix) for spoken in held_out if can_bistream(spoken, mix)],
            "pronunciation": texts.pronunciations("test", ids),
        }
        text = ""
        for group, layouts in groups.items():
            values = measured(model, layouts, device)
            text += f"\n{group}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items())
        return text

    path = training_file(args.work, NAME)
    step = partial(training_step, model, learner)
    train(NAME, path, {"model": learner}, step, draw, args.minutes, args.total, check)
    print(export(args.work), flush=True)


if __name__ == "__main__":
    main()
