"""Trains the speech tokenizer: 25 codes per second that represent what is spoken, and roughly how, but not
the speaker.

    python -m training.codec.speech_tokenizer [--minutes 3] [--work build/train_mini]

Writes training/speech_tokenizer.pt and checkpoint/speech_tokenizer_v2.onnx in the work folder. As in
CosyVoice 2 (Du et al. 2024), codes are the quantized values in the middle of a network trained to recognise
phonemes; here pitch, loudness and the mel spectrogram are predicted from them as well. The predictor of the
mel spectrogram also gets the speaker, so that the codes need not represent it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.checkpoint.config import MelConfig
from light_tts.models.flow.unet.estimator import ChannelNorm
from light_tts.models.frontend.features import flow_mels, whisper_log_mels
from light_tts.models.frontend.speech_tokenizer import FILE_NAME
from training.checkpoint import checkpoint_folder, training_file, write_config
from training.codec.convnext import ConvNeXt, frame_mask
from training.codec.features import resample
from training.corpus.corpus import LABEL_RATE, SAMPLE_RATE, SILENCE, Corpus
from training.corpus.crops import Crops, disturbed
from training.corpus.packages import phoneme_ids
from training.devices import mixed_precision, set_precision, training_device
from training.loop import Learner, averaged_weights, train, training_parser
from training.onnx.half import part_of, rounded, write_onnx

NAME = "speech_tokenizer"
WHISPER_MELS = 128
WIDTH, HIDDEN, KERNEL = 224, 768, 7
FAST_BLOCKS, SLOW_BLOCKS = 2, 4  # at 50 and at 25 frames per second
DIGITS, LEVELS = 6, 3  # 3^6 codes

FRAME = SAMPLE_RATE // LABEL_RATE  # samples
CROP_FRAMES, BATCH = 160, 192  # 3.2 s, 614 s in total
MARGIN = 12 * FRAME
JITTER = FRAME // 4  # random offset in samples between label frames and code frames
RATE = 1e-3

HEAD_WIDTH, HEAD_KERNEL = 256, 3
SPEAKER_SIZE = 64
VOICED = 60.0  # Hz; the teacher's F0 is lower in unvoiced frames
PITCH_SPREAD = 0.25  # standard deviation of log F0 within a speaker, to normalize targets
USUAL_MEL = -6.0  # average log of the mel spectrogram
QUIET, LOUD = -5.0, 2.0  # log loudness relative to the utterance
PUNCTUATION, BLANK, STRESS = ';:,.!?—…"()“”', " ", "ˈˌ"  # phoneme symbols of the teacher
# Weights of the losses; the phonemes are the most important.
WEIGHTS = {"phoneme": 1.0, "pitch": 0.2, "voiced": 0.2, "loudness": 0.15, "mel": 0.3}


class SpeechTokenizer(nn.Module):
    """Maps the log mel spectrogram of `whisper_log_mels` to codes, one per four frames. Context: 0.6 s on
    each side."""

    def __init__(self) -> None:
        super().__init__()
        self.to_50 = nn.Conv1d(WHISPER_MELS, WIDTH, 3, stride=2, padding=1)
        self.fast = nn.ModuleList(ConvNeXt(WIDTH, HIDDEN, KERNEL) for _ in range(FAST_BLOCKS))
        self.norm_50 = ChannelNorm(WIDTH)
        self.to_25 = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.slow = nn.ModuleList(ConvNeXt(WIDTH, HIDDEN, KERNEL) for _ in range(SLOW_BLOCKS))
        self.norm_25 = nn.LayerNorm(WIDTH)
        self.to_digits = nn.Linear(WIDTH, DIGITS)
        self.register_buffer("places", LEVELS ** torch.arange(DIGITS), persistent=False)

    def forward(self, mel: Tensor, frames: Tensor | None = None) -> Tensor:
        """mel: (batch, 128, frames), 100 per second; frames: (batch,) number of valid frames -> the digits
        before rounding, (batch, tokens, DIGITS) in -1 to 1"""
        length = mel.shape[2]
        masks: list[Tensor | None] = [None, None, None]
        if frames is not None:
            tokens = [frames, (frames + 1) // 2, (frames + 3) // 4]
            masks = [frame_mask(own, -(-length // 2**n)) for n, own in enumerate(tokens)]
        x = self.to_50(mel if masks[0] is None else mel * masks[0])
        for block in self.fast:
            x = block(x, masks[1])
        x = self.norm_50(x)
        x = self.to_25(x if masks[1] is None else x * masks[1])
        for block in self.slow:
            x = block(x, masks[2])
        return self.to_digits(self.norm_25(x.transpose(1, 2))).float().tanh()

    def ids(self, digits: Tensor) -> Tensor:
        """digits: (..., DIGITS) from `forward` -> (...) int64, below LEVELS ** DIGITS."""
        return ((digits.round().long() + 1) * self.places).sum(-1)


def quantised(digits: Tensor) -> Tensor:
    """Round with a straight-through gradient (Mentzer et al. 2023, "Finite scalar quantization: VQ-VAE made
    simple")."""
    return digits + (digits.round() - digits).detach()


class CodePredictor(nn.Module):
    """Predicts the targets from the codes. Its context is small, so that each code must contain the
    information itself."""

    def __init__(self, phonemes: int, speakers: int, mels: int) -> None:
        super().__init__()
        self.spoken = nn.Linear(DIGITS, HEAD_WIDTH)
        self.spoken_blocks = nn.ModuleList(
            ConvNeXt(HEAD_WIDTH, 2 * HEAD_WIDTH, HEAD_KERNEL) for _ in range(2)
        )
        self.labels = nn.Linear(HEAD_WIDTH, 2 * (phonemes + 3))
        self.sound = nn.Linear(DIGITS, HEAD_WIDTH)
        self.speaker = nn.Embedding(speakers, SPEAKER_SIZE)
        self.voice = nn.Linear(SPEAKER_SIZE, HEAD_WIDTH)
        self.sound_blocks = nn.ModuleList(ConvNeXt(HEAD_WIDTH, 2 * HEAD_WIDTH, HEAD_KERNEL) for _ in range(3))
        self.mel = nn.Linear(HEAD_WIDTH, 2 * mels)
        nn.init.constant_(self.mel.bias, USUAL_MEL)

    def recognise(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """codes: (batch, tokens, DIGITS) -> for 2 frames a token: logits of phonemes (batch, frames,
        phonemes), and pitch, logit of voice, loudness (batch, frames, 3)"""
        x = self.spoken(codes).transpose(1, 2)
        for block in self.spoken_blocks:
            x = block(x)
        found = _two_frames(self.labels(x.transpose(1, 2)))
        return found[..., :-3], found[..., -3:]

    def spectrum(self, codes: Tensor, speaker: Tensor) -> Tensor:
        """codes: (batch, tokens, DIGITS); speaker: (batch,) -> (batch, frames, mels)"""
        x = (self.sound(codes) + self.voice(self.speaker(speaker))[:, None]).transpose(1, 2)
        for block in self.sound_blocks:
            x = block(x)
        return _two_frames(self.mel(x.transpose(1, 2)))


def _two_frames(x: Tensor) -> Tensor:
    """(batch, tokens, 2 * size) -> (batch, 2 * tokens, size)"""
    return x.float().reshape(len(x), 2 * x.shape[1], -1)


class TaughtTokenizer(nn.Module):
    """The modules that are trained together."""

    def __init__(self, phonemes: int, speakers: int, mels: int) -> None:
        super().__init__()
        self.tokenizer = SpeechTokenizer()
        self.listener = CodePredictor(phonemes, speakers, mels)


@dataclass(frozen=True)
class Targets:
    """The targets. phoneme: (batch, frames) int64; pitch: (batch, frames) log F0 relative to the speaker's
    mean, valid where `voiced`; loudness: (batch, frames); mel: (batch, frames, mels)."""

    phoneme: Tensor
    pitch: Tensor
    voiced: Tensor
    loudness: Tensor
    mel: Tensor


def losses(
    taught: TaughtTokenizer, log_mels: Tensor, speaker: Tensor, targets: Targets
) -> tuple[dict[str, Tensor], Tensor]:
    """log_mels: (batch, 128, 2 * frames) -> each loss, and the phoneme accuracy."""
    codes = quantised(taught.tokenizer(log_mels))
    logits, others = taught.listener.recognise(codes)
    mel = taught.listener.spectrum(codes, speaker)
    pitch, voiced, loudness = others.unbind(-1)
    found = {
        "phoneme": F.cross_entropy(logits.flatten(0, 1), targets.phoneme.flatten()),
        "pitch": ((pitch - targets.pitch).abs() * targets.voiced).sum() / targets.voiced.sum().clamp(min=1),
        "voiced": F.binary_cross_entropy_with_logits(voiced, targets.voiced),
        "loudness": F.l1_loss(loudness, targets.loudness),
        "mel": F.l1_loss(mel, targets.mel),
    }
    return found, (logits.argmax(-1) == targets.phoneme).float().mean()


def audible(phoneme: Tensor, ids: dict[str, int]) -> Tensor:
    """phoneme: (frames,) as given to the teacher -> audible phonemes: stress marks and spaces are replaced by
    the following phoneme, spaces in a pause and punctuation by silence."""

    def any_of(signs: str) -> Tensor:
        return torch.isin(phoneme, torch.tensor([ids[sign] for sign in signs], device=phoneme.device))

    quiet = any_of(PUNCTUATION) | (phoneme == SILENCE)
    blank = any_of(BLANK)
    passed = blank | any_of(STRESS)
    place = torch.arange(len(phoneme), device=phoneme.device)
    before = torch.where(passed, 0, place).cummax(0).values
    after = torch.where(passed, len(phoneme) - 1, place).flip(0).cummin(0).values.flip(0)
    return torch.where(quiet | quiet[after] | (blank & quiet[before]), SILENCE, phoneme[after])


class Labelled:
    """A corpus with all training targets."""

    def __init__(self, corpus: Corpus, config: MelConfig, ids: dict[str, int]) -> None:
        self.corpus, self._config = corpus, config
        labels = corpus.labels
        labels.phoneme.copy_(audible(labels.phoneme, ids))
        speaker = corpus.speaker.repeat_interleave(corpus.frames)
        voiced = (labels.f0 > VOICED).float()
        sums = torch.zeros(2, len(corpus.speakers), device=corpus.device)
        sums[0].index_add_(0, speaker, voiced * labels.f0.clamp(min=1).log())
        sums[1].index_add_(0, speaker, voiced)
        self._pitch = sums[0] / sums[1].clamp(min=1)
        pieces = corpus.wave.split(corpus.samples.tolist())
        self._loudness = torch.stack([_log_rms(piece.float() / 32768) for piece in pieces])

    def targets(self, index: Tensor, begin: Tensor, wave: Tensor) -> Targets:
        """index: (batch,) utterances; begin: (batch,) sample at which `wave` begins in them; wave: (batch,
        samples), whole frames"""
        frames = wave.shape[1] // FRAME
        first = (begin + FRAME // 2).div(FRAME, rounding_mode="floor")
        phoneme, f0, _ = self.corpus.label_crops(index, first, frames)
        pitch = f0.clamp(min=1).log() - self._pitch[self.corpus.speaker[index]][:, None]
        loudness = _log_rms(wave.unflatten(1, (frames, FRAME))) - self._loudness[index][:, None]
        return Targets(
            phoneme,
            pitch / PITCH_SPREAD,
            (f0 > VOICED).float(),
            loudness.clamp(QUIET, LOUD),
            flow_mels(wave, self._config).transpose(1, 2),
        )


def _log_rms(wave: Tensor) -> Tensor:
    """(..., samples) -> (...)"""
    return 0.5 * (wave.square().mean(-1) + 1e-8).log()


def corpus_log_mels(wave: Tensor) -> Tensor:
    """wave: (batch, samples) of the corpus -> (batch, 128, frames), 100 a second"""
    return whisper_log_mels(resample(wave, SAMPLE_RATE))


def load_tokenizer(work: Path, device: torch.device) -> SpeechTokenizer:
    """Return the trained tokenizer, with the weights of the exported file."""
    module = SpeechTokenizer()
    module.load_state_dict(part_of(averaged_weights(training_file(work, NAME)), "tokenizer"))
    return rounded(module).to(device).eval()


class _Exported(nn.Module):
    """With the arguments of CosyVoice2's tokenizer."""

    def __init__(self, tokenizer: SpeechTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, feats: Tensor, feats_length: Tensor) -> Tensor:
        return self.tokenizer.ids(self.tokenizer(feats[:, :, : feats_length[0].long()])).int()


def export_tokenizer(tokenizer: SpeechTokenizer, path: Path) -> None:
    """feats (1, 128, frames) float32, feats_length (1,) int32 -> indices (1, tokens) int32"""
    example = (torch.randn(1, WHISPER_MELS, 101), torch.tensor([101], dtype=torch.int32))
    dynamic = {"feats": {2: "frames"}, "indices": {1: "tokens"}}
    write_onnx(_Exported(tokenizer), example, ["feats", "feats_length"], "indices", dynamic, path)


def export(work: Path) -> Path:
    """Export the trained tokenizer to the checkpoint."""
    path = checkpoint_folder(work) / FILE_NAME
    export_tokenizer(load_tokenizer(work, torch.device("cpu")), path)
    return path


@torch.no_grad()
def check(taught: TaughtTokenizer, labelled: Labelled) -> str:
    """Return how well phonemes can be recognised from the codes of whole utterances, and how many codes are
    used."""
    corpus, device = labelled.corpus, labelled.corpus.device
    hits, counts = torch.zeros(4, device=device), torch.zeros(LEVELS**DIGITS, device=device)
    for number, samples in enumerate(corpus.samples.tolist()):
        index, begin = torch.tensor([number], device=device), torch.zeros(1, dtype=torch.int64, device=device)
        wave = corpus.crops(index, begin, samples // FRAME * FRAME)
        targets = labelled.targets(index, begin, wave)
        digits = taught.tokenizer(corpus_log_mels(wave))
        logits, _ = taught.listener.recognise(quantised(digits))
        frames = targets.phoneme.shape[1]
        right = (logits.argmax(-1)[:, :frames] == targets.phoneme).float()
        spoken = (targets.phoneme != SILENCE).float()
        hits += torch.stack([right.sum(), right.new_tensor(frames), (right * spoken).sum(), spoken.sum()])
        counts += torch.bincount(taught.tokenizer.ids(digits).flatten(), minlength=len(counts))
    share = counts / counts.sum()
    entropy = -(share * share.clamp(min=1e-12).log2()).sum()
    everywhere, spoken = (hits[::2] / hits[1::2]).tolist()
    return (
        f"phonemes of held-out speakers: {everywhere:.1%} of frames right, {spoken:.1%} without pauses; "
        f"{int((counts > 0).sum())} of {len(counts)} codes used, {entropy:.2f} bits each "
        f"(perplexity {2**entropy:.0f})"
    )


def main() -> None:
    args = training_parser(__doc__, minutes=3.0).parse_args()
    device = training_device()
    config, ids, path = write_config(args.work)[0].mel, phoneme_ids(args.work), training_file(args.work, NAME)
    labelled = Labelled(Corpus.load(args.work, device, shards=args.shards), config, ids)
    corpus = labelled.corpus
    print(f"{NAME}: {corpus.seconds / 3600:.2f} h, {len(corpus.speakers)} speakers", flush=True)
    taught = TaughtTokenizer(max(ids.values()) + 1, len(corpus.speakers), config.num_mels).to(device)
    learner = Learner(taught, RATE)
    crops = Crops(corpus, corpus.samples, CROP_FRAMES * FRAME, MARGIN)

    def step(index: Tensor, begin: Tensor) -> dict[str, Tensor]:
        begin = begin // FRAME * FRAME + torch.randint(-JITTER, JITTER + 1, begin.shape, device=device)
        wave = corpus.crops(index, begin, CROP_FRAMES * FRAME)
        targets = labelled.targets(index, begin, wave)
        mel = corpus_log_mels(disturbed(wave))
        with mixed_precision(device):
            found, right = losses(taught, mel, corpus.speaker[index], targets)
        norm = learner.learn(sum(WEIGHTS[name] * loss for name, loss in found.items()))
        return {**{name: loss.detach() for name, loss in found.items()}, "right": right, "norm": norm}

    def finish() -> str:
        set_precision(fast=False)
        taught.load_state_dict(averaged_weights(path))
        rounded(taught.tokenizer)
        export(args.work)
        return check(taught, Labelled(Corpus.load(args.work, device, "test", args.shards), config, ids))

    train(NAME, path, {"model": learner}, step, lambda: crops.draw(BATCH), args.minutes, args.total, finish)


if __name__ == "__main__":
    main()
