"""Trains the language model: text to speech tokens and, so that it learns the pronunciation of rare words,
text to the teacher's phonemes. Some heads learn to attend to the text being spoken (ALIGNMENT_HEADS), based
on the teacher's durations.

    python -m training.lm.language_model [--minutes 5] [--total 5] [--work build/train_mini]

Requires the text tokenizer (text_tokenizer.py) and the speech tokens (encode.py). Every CHECK_MINUTES and at
the end it speaks held-out sentences (free_generation.py) with two running averages of the weights. The better
one is saved in training/language_model_best.pt, from which llm.pt in the checkpoint is written.
"""

from __future__ import annotations

import math
import traceback
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.llm.speech_lm import SpeechIds, SpeechLM
from training.checkpoint import ALIGNMENT_HEADS, checkpoint_folder, training_file, write_config, write_weights
from training.devices import mixed_precision, sent, training_device
from training.lm.attention import Packed, Watched
from training.lm.data import Texts, fits, speech_layout, training_layouts
from training.lm.free_generation import Examination
from training.lm.layouts import NONE, Layout, Spoken, can_bistream, joined
from training.lm.packing import batches, packed, prefetched
from training.lm.weights import BEST, NAME, keep_better, weights_to_use
from training.loop import Learner, averaged_weights, train, training_parser

ROWS = 16  # of a batch
DROPOUT = 0.1
# average fraction of speech tokens replaced in the input, because the model's own will contain errors, too
NOISE = 0.08
PHONEME_WEIGHT = 0.5
ALIGNMENT_WEIGHT = 0.2
RATE = 1.5e-3
WEIGHT_DECAY = 0.1
SLOW_AVERAGE = 0.9998
CHECK_MINUTES = 5.0


class TrainedLM(nn.Module):
    """`lm` and the additional tables for reading and predicting phonemes, which exist only in training."""

    def __init__(self, lm: SpeechLM, phonemes: int) -> None:
        super().__init__()
        self.lm = lm
        self.heads = ALIGNMENT_HEADS
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
        """Initialize like GPT-2: contributions to the residual stream are smaller with more layers."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(
                    std=0.02 / math.sqrt(2 * self.lm.backbone.num_hidden_layers) if adds else 0.02
                )

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor, Watched]:
        """batch: (PLANES, rows, n) from `packed` -> logits of speech ids and of phonemes, (rows * n, ...)
        float32, and the attention of the heads"""
        inputs, positions, sequence = batch[:3]
        on_gpu = batch.is_cuda
        with mixed_precision(batch.device):
            watched = Watched(batch[5:], inputs < self.lm.ids.text_vocab)
            if self.training:
                inputs = with_noise(inputs, self.lm.ids)
            table = torch.cat([*self.lm.tables, self.phoneme_embedding.weight])
            dtype = torch.bfloat16 if on_gpu else torch.float32
            attention = Packed(sequence, dtype, watched, self.heads)
            x = self.dropout(F.embedding(inputs.flatten(), table))
            hidden = self.lm.hidden(x, positions.flatten(), attention)
            return self.lm.logits(hidden), self.phoneme_decoder(hidden).float(), watched


def with_noise(inputs: Tensor, ids: SpeechIds) -> Tensor:
    """Replace some speech tokens by random ones, in some rows more than in others. inputs: (rows, n) unified
    ids."""
    first, end = ids.text_vocab, ids.text_vocab + ids.speech_tokens
    other = torch.randint_like(inputs, first, end)
    share = 2 * NOISE * torch.rand(len(inputs), 1, device=inputs.device)
    wrong = (inputs >= first) & (inputs < end) & (torch.rand(inputs.shape, device=inputs.device) < share)
    return torch.where(wrong, other, inputs)


class SlowAverage:
    """A second running average of a `Learner`'s parameters, over a longer time."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = [p.detach() for p in module.parameters()]
        self._averaged = [p.clone() for p in self._parameters]

    def follow(self) -> None:
        torch._foreach_lerp_(self._averaged, self._parameters, 1 - SLOW_AVERAGE)

    def begin(self) -> None:
        """Restart from the current weights."""
        torch._foreach_copy_(self._averaged, self._parameters)

    def weights(self) -> dict[str, Tensor]:
        names = [name for name, _ in self._module.named_parameters()]
        return {**self._module.state_dict(), **dict(zip(names, self._averaged, strict=True))}


def training_step(
    model: TrainedLM, learner: Learner, batch: Tensor, slow: SlowAverage | None = None
) -> dict[str, Tensor]:
    """One step, which may be recorded. batch: (PLANES, rows, n) from `packed`."""
    *logits, watched = model(batch)
    targets = batch[3:5].flatten(1).long()
    speech, phoneme = (_mean_loss(logit, target) for logit, target in zip(logits, targets, strict=True))
    norm = learner.learn(speech + PHONEME_WEIGHT * phoneme + ALIGNMENT_WEIGHT * watched.loss)
    if slow is not None:
        slow.follow()
    losses = {"speech": speech, "phoneme": phoneme, "alignment": watched.loss}
    return {**{name: loss.detach() for name, loss in losses.items()}, "gradient": norm}


def _mean_loss(logits: Tensor, target: Tensor) -> Tensor:
    total = F.cross_entropy(logits, target, ignore_index=NONE, reduction="sum")
    return total / (target != NONE).sum().clamp(min=1)


@torch.no_grad()
def measured(
    model: TrainedLM, layouts: list[Layout], device: torch.device, rows: int = ROWS
) -> dict[str, float]:
    """Return, over all `layouts`: nats and accuracy of speech tokens, of the end, of the fill id, and of
    phonemes; nats of the attention fraction that heads give to the words being spoken, and how often it is
    above one half. Missing kinds are omitted."""
    ids = model.lm.ids
    sums: dict[str, Tensor] = {}

    def add(name: str, nats: Tensor, right: Tensor) -> None:
        values = torch.stack([nats.new_tensor(len(nats)), nats.sum(), right.sum()]).double().cpu()
        sums[name] = sums.get(name, 0) + values

    while layouts:
        batch, layouts = packed(layouts, rows)
        batch = torch.from_numpy(batch).to(device)
        *logits, watched = model(batch)
        for kind, logit, target in zip(("speech", "phoneme"), logits, batch[3:5].flatten(1), strict=True):
            target = target.long()
            nats = F.cross_entropy(logit, target.clamp(min=0), reduction="none")
            right = logit.argmax(-1) == target
            kinds = {kind: target >= 0}
            if kind == "speech":
                spoken = (target >= 0) & (target < ids.speech_tokens)
                kinds = {kind: spoken, "end": target == ids.eos, "fill": target == ids.fill}
            for name, where in kinds.items():
                add(name, nats[where], right[where])
        nats = watched.nats[:, watched.known].flatten()
        add("alignment", nats, nats < math.log(2))
    found = {name: values.tolist() for name, values in sums.items() if values[0]}
    nats = {f"{name}_nats": total / count for name, (count, total, _) in found.items()}
    return {**nats, **{f"{name}_accuracy": right / count for name, (count, _, right) in found.items()}}


def export(work: Path) -> Path:
    """Write llm.pt to the checkpoint, in half precision and with the names of CosyVoice2, from the weights to
    use."""
    weights = tied(averaged_weights(weights_to_use(work)))
    state = {name.removeprefix("lm."): value for name, value in weights.items() if name.startswith("lm.")}
    return write_weights(checkpoint_folder(work) / "llm.pt", state)


def tied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the text head tied to the text table, whose average has only one name."""
    return {**weights, "lm.llm.model.lm_head.weight": weights["lm.llm.model.model.embed_tokens.weight"]}


def held_out_nats(model: TrainedLM, texts: Texts, mix: tuple[int, int], device: torch.device) -> str:
    """Return the losses on held-out speakers and sentences; each utterance has another one of its speaker as
    prompt, if possible."""
    ids = model.lm.ids

    def held_out(mandarin: bool) -> list[list[Spoken]]:
        parts = [
            [voice[number - 1], spoken] if len(voice) > 1 else [spoken]
            for voice in texts.voices("test", mandarin)
            for number, spoken in enumerate(voice)
        ]
        return [some for some in parts if fits(some)]

    groups = {"pronunciation": texts.pronunciations("test", ids)}
    for language, mandarin in (("", False), (" in Mandarin", True))[: 1 + texts.mandarin]:
        parts = held_out(mandarin)
        groups[f"at once{language}"] = [speech_layout(some, ids, mix, False) for some in parts]
        groups[f"bistream{language}"] = [
            speech_layout(some, ids, mix, True) for some in parts if can_bistream(joined(some), mix)
        ]
    text = ""
    for group, layouts in groups.items():
        values = measured(model, layouts, device)
        text += f"\n{group}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items())
    return text


def main() -> None:
    parser = training_parser(__doc__, minutes=5.0)
    parser.add_argument("--sentences", type=int, default=240, help="to speak at each check")
    args = parser.parse_args()
    device = training_device()
    config, backbone, _ = write_config(args.work)
    mix = config.llm.mix_ratio
    texts = Texts(args.work, args.shards)
    model = TrainedLM(SpeechLM(backbone, config.llm), texts.phonemes).to(device)
    learner, slow = Learner(model, RATE, weight_decay=WEIGHT_DECAY), SlowAverage(model)
    voices, pronunciations = texts.voices("train"), texts.pronunciations("train", model.lm.ids)
    tokens = sum(len(spoken.speech) for voice in voices for spoken in voice)
    print(
        f"{tokens} speech tokens of {len(voices)} speakers, {len(pronunciations)} sentences; it is known "
        f"what is spoken when in {texts.aligned} of {texts.utterances} utterances",
        flush=True,
    )
    layouts = training_layouts(voices, pronunciations, model.lm.ids, mix, np.random.default_rng())
    take = prefetched(batches(layouts, ROWS))
    path, best = training_file(args.work, NAME), training_file(args.work, BEST)

    def draw() -> list[Tensor]:
        return [sent(torch.from_numpy(take()), device)]

    @cache
    def examination() -> Examination:
        return Examination(args.work, texts, config, backbone, device, args.sentences)

    def hear(streams: bool = False) -> str:
        """Evaluate both averages, at the end also in bistream; training continues in any case."""
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            text = ""
            for name, weights in (("average", learner.state()["average"]), ("slow average", slow.weights())):
                found = examination().examine(weights)
                # English errors do not select between weights that also speak Mandarin.
                kept = not texts.mandarin and keep_better(best, weights, found.errors, saved["steps"])
                text += f"\n{name}: {found}{'; the best so far' if kept else ''}"
                if streams:
                    text += f"\n{name}, bistream: {examination().examine(weights, streams=True)}"
            return text
        except Exception:
            return f"\nspeaking failed:\n{traceback.format_exc()}"

    def check() -> str:
        text = hear(streams=True)
        model.load_state_dict(tied(averaged_weights(path)))
        model.eval()
        return text + held_out_nats(model, texts, mix, device)

    if path.exists():
        learner.load(torch.load(path, map_location="cpu", weights_only=True)["model"])
    slow.begin()
    step = partial(training_step, model, learner, slow=slow)
    train(NAME, path, {"model": learner}, step, draw, args.minutes, args.total, check, hear, CHECK_MINUTES)
    print(export(args.work), flush=True)


if __name__ == "__main__":
    main()
