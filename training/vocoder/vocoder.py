"""The vocoder, HiFT, trained on crops of the teacher's speech: mel spectrogram -> wave.

    python -m training.vocoder.vocoder [--minutes 20] [--total 20] [--flow_mels 0.6]

At first (SHAPING of the time) spectra have to be alike and the source has the teacher's pitch; from then on
judges compare the waves, and the source has the pitch that the vocoder predicts, as when it is used. With
--flow_mels, for the last minutes, so large a share of the mels is of the flow's making (flow_mels.py). Ends
with checkpoint/hift.pt, of the averaged weights.

The pitch to learn is the teacher's F0, which its own decoder takes: where it is unvoiced that is 5 to 10 Hz,
and values up to LOWEST_F0 are steps on the way to or from there. HiFT speaks with a voice above 10 Hz, and a
pulse of 30 Hz is heard as a click: so all below LOWEST_F0 is 0. The loss is an absolute one, whose best guess
is the median: in doubt either voiced or not, never in between.

Work for one second of speech, forward (counted): the vocoder 4.4 GFLOP, judges of periods 2.9 and of spectra
7.8. A step takes the vocoder's 3 times (TF32) and the judges' 8 times (bfloat16: twice forward, four times
back for themselves, twice back to the vocoder, half of that of the teacher's waves, for nothing).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from light_tts.models.checkpoint.config import Config, MelConfig
from light_tts.models.frontend.features import flow_mels
from light_tts.models.vocoder import hift
from light_tts.models.vocoder.hift import FILE_NAME, Hift
from training.checkpoint import checkpoint_folder, training_file, write_config, write_weights
from training.corpus.corpus import LABEL_RATE, SAMPLE_RATE, Corpus
from training.devices import sent, training_device
from training.loop import Learner, averaged_weights, train, training_parser
from training.vocoder.discriminators import Discriminators
from training.vocoder.flow_mels import FlowMels, load_flow
from training.vocoder.flow_mels import flow_mels as mels_of_flow
from training.vocoder.spectral_losses import mel_distance, stft_distance

NAME = "vocoder"
BATCH, FRAMES = 16, 32  # 0.64 s each
PITCHED = 128  # crops whose pitch is learnt, those that are spoken among them: the predictor is small
CONTEXT = 8  # frames on each side: 2 see the padding of the mel's crop, and the pitch is that of 5 around
SAMPLES_PER_FRAME = SAMPLE_RATE // LABEL_RATE

SHAPING = 0.08  # share of the time
RATE, JUDGES_RATE = 4e-4, 3e-4  # for BATCH
BETAS = (0.8, 0.99)
MEL_WEIGHT, STFT_WEIGHT, MATCHING_WEIGHT, F0_WEIGHT = 45.0, 5.0, 2.0, 10.0

LOWEST_F0 = 50.0  # Hz
UNVOICED_SCALE = 100.0  # Hz, that weigh as much where unvoiced as 100 % of the pitch where voiced
# The flow's spectrograms are not exact: this share is given with noise of up to this deviation.
NOISY, NOISE = 0.3, 0.1

TEST_UTTERANCES, TEST_FRAMES = 64, 100


@dataclass(frozen=True)
class VocoderCrops:
    """mel: (batch, mels, CONTEXT + frames + CONTEXT); wave: (batch, samples); f0: (batch, frames) in Hz, 0
    where unvoiced."""

    mel: Tensor
    wave: Tensor
    f0: Tensor


def crops(
    corpus: Corpus,
    config: MelConfig,
    index: Tensor,
    begin: Tensor,
    frames: int = FRAMES,
    made: FlowMels | None = None,
    share: float = 0.0,
) -> VocoderCrops:
    """index: (batch,) utterances; begin: (batch,) first frame of each crop. The mel is that of the whole
    utterance, but for 2 frames at both ends of the context; so large a share of them is `made`, of those that
    there are."""
    first = (begin - CONTEXT) * SAMPLES_PER_FRAME
    wave = corpus.crops(index, first, (frames + 2 * CONTEXT) * SAMPLES_PER_FRAME)
    _, f0, _ = corpus.label_crops(index, begin, frames)
    around = CONTEXT * SAMPLES_PER_FRAME
    mel = flow_mels(wave, config)
    if made:
        other, there = made.crops(index, begin - CONTEXT, frames + 2 * CONTEXT)
        taken = there & (torch.rand(len(index), device=mel.device) < share)
        mel = torch.where(taken[:, None, None], other, mel)
    return VocoderCrops(mel, wave[:, around:-around], torch.where(f0 < LOWEST_F0, 0.0, f0))


def f0_distance(f0: Tensor, target: Tensor) -> Tensor:
    """f0, target: (batch, frames) in Hz, target 0 where unvoiced -> (): mean difference, relative to the
    pitch."""
    return ((f0 - target).abs() / torch.where(target > 0, target, UNVOICED_SCALE)).mean()


class Training:
    """What the steps do, for `index` and `begin` that `draw` gives."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        batch: int = BATCH,
        pitched: int = PITCHED,
        made: FlowMels | None = None,
        share: float = 0.0,
    ) -> None:
        """`made`: mels of the flow, a `share` of those that are given."""
        self._corpus, self._mel, self._batch, self._drawn = corpus, config.mel, batch, max(batch, pitched)
        self._made, self._share = made, share
        self.model = new_vocoder(config).to(corpus.device)
        self.judges = Discriminators().to(corpus.device)
        larger = max(batch / BATCH, 1.0) ** 0.5  # the noise of a gradient falls so with the batch
        self.learners = {
            "model": Learner(self.model, larger * RATE, BETAS, clip=1000.0),
            "discriminators": Learner(self.judges, larger * JUDGES_RATE, BETAS, clip=1000.0),
        }
        self._ends = corpus.frames.cumsum(0).cpu().numpy()
        self._begins = self._ends - corpus.frames.cpu().numpy()
        self._random = np.random.default_rng()

    def draw(self) -> tuple[Tensor, Tensor]:
        """Any frame of the corpus is as likely as any other to be the first of a crop, but for those near an
        utterance's end, which are moved forward."""
        place = self._random.integers(0, self._ends[-1], self._drawn)
        index = np.searchsorted(self._ends, place, side="right")
        last = np.maximum(self._ends[index] - self._begins[index] - FRAMES, 0)
        begin = np.minimum(place - self._begins[index], last)
        return tuple(sent(torch.from_numpy(values), self._corpus.device) for values in (index, begin))

    def shape(self, index: Tensor, begin: Tensor) -> dict[str, Tensor]:
        """A step of the first phase: the spectra alone, with the teacher's pitch."""
        given, wave, f0 = self._speak(index, begin, predicted=False)
        losses = {
            "mel": mel_distance(wave, given.wave, SAMPLE_RATE),
            "stft": stft_distance(wave, given.wave),
            "f0": f0_distance(f0, given.f0),
        }
        loss = MEL_WEIGHT * losses["mel"] + STFT_WEIGHT * losses["stft"] + F0_WEIGHT * losses["f0"]
        losses["norm"] = self.learners["model"].learn(loss)
        return detached(losses)

    def compete(self, index: Tensor, begin: Tensor) -> dict[str, Tensor]:
        """A step of the second phase: the judges hear both waves once, and they and the vocoder learn from
        that; the source has the pitch that the vocoder predicts. Magnitudes of single bins no longer count:
        their best guess is a smooth one."""
        given, wave, f0 = self._speak(index, begin, predicted=True)
        shown = wave.detach().requires_grad_()
        found = self.judges.compare(given.wave, shown)
        losses = {
            "mel": mel_distance(wave, given.wave, SAMPLE_RATE),
            "f0": f0_distance(f0, given.f0),
            "deceiving": found.deceiving,
            "matching": found.matching,
            "judging": found.judging,
        }
        # What the judges say of the wave goes through them once, without a gradient of their own weights.
        judged = found.deceiving + MATCHING_WEIGHT * found.matching
        (verdict,) = torch.autograd.grad(judged, shown, retain_graph=True)
        judges_norm = self.learners["discriminators"].learn(found.judging)
        loss = MEL_WEIGHT * losses["mel"] + F0_WEIGHT * losses["f0"] + (verdict * wave).sum()
        norm = self.learners["model"].learn(loss)
        return detached({**losses, "norm": norm, "judges_norm": judges_norm})

    def _speak(self, index: Tensor, begin: Tensor, predicted: bool) -> tuple[VocoderCrops, Tensor, Tensor]:
        """What is given, but waves only of those that are spoken; what the vocoder makes of it: wave (spoken,
        samples), with the predicted pitch or with that of the teacher, and f0 (batch, frames)."""
        given = crops(self._corpus, self._mel, index, begin, made=self._made, share=self._share)
        deviation = NOISE * torch.rand_like(given.mel[:, :1, :1])
        noisy = torch.rand_like(deviation) < NOISY
        mel = given.mel + torch.randn_like(given.mel) * deviation * noisy
        f0 = predicted_f0(self.model, mel)
        source_f0 = f0.detach() if predicted else given.f0
        wave = speak(self.model, mel[: self._batch], source_f0[: self._batch])
        return replace(given, wave=given.wave[: self._batch]), wave, f0


def predicted_f0(model: Hift, mel: Tensor) -> Tensor:
    """mel: (batch, mels, CONTEXT + frames + CONTEXT) -> (batch, frames) in Hz"""
    return model.f0(mel, [mel.shape[2]] * len(mel))[:, CONTEXT:-CONTEXT]


def speak(model: Hift, mel: Tensor, source_f0: Tensor) -> Tensor:
    """mel: (batch, mels, CONTEXT + frames + CONTEXT); source_f0: (batch, frames) in Hz -> wave (batch,
    samples)"""
    batch, frames = source_f0.shape
    noise = torch.randn(batch, frames * model.samples_per_frame, model.m_source.waves, device=mel.device)
    source = model.m_source(source_f0, noise)
    return model.decode(mel[:, :, CONTEXT:-CONTEXT].contiguous(), source, [frames] * batch)


def detached(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in losses.items()}


def new_vocoder(config: Config) -> Hift:
    """Begins with about the right loudness and pitch, which it would be slow to reach."""
    model = Hift(config.hift)
    with torch.no_grad():
        model.f0_predictor.classifier.weight.mul_(100.0)
        model.f0_predictor.classifier.bias.fill_(100.0)
        model.conv_post.bias[: model.n_fft // 2 + 1] = -2.0  # logarithm of magnitudes
    return model


@torch.no_grad()
def copy_synthesis(model: Hift, corpus: Corpus, config: MelConfig) -> str:
    """How the middle of test utterances comes back from its mel."""
    long_enough = (corpus.frames >= TEST_FRAMES).nonzero()[:TEST_UTTERANCES, 0]
    begin = (corpus.frames[long_enough] - TEST_FRAMES) // 2
    given = crops(corpus, config, long_enough, begin, TEST_FRAMES)
    f0 = predicted_f0(model, given.mel)
    wave = speak(model, given.mel, f0)
    difference = (flow_mels(wave, config) - flow_mels(given.wave, config)).abs().mean()
    voiced = given.f0 > 0
    found = f0 > model.config.nsf_voiced_threshold
    both = voiced & found
    error = (f0 - given.f0).abs()[both]
    return (
        f"{len(begin)} test utterances: mel L1 {difference:.3f}; F0 {error.mean():.1f} Hz off where voiced "
        f"({100 * (error / given.f0[both]).mean():.1f} %); {100 * (voiced & ~found).float().mean():.1f} % of "
        f"frames wrongly unvoiced, {100 * (found & ~voiced).float().mean():.1f} % wrongly voiced"
    )


def load_averaged(model: Hift, path: Path) -> Hift:
    model.load_state_dict(averaged_weights(path))
    return model.eval()


def export(work: Path) -> Path:
    """Writes hift.pt into the checkpoint's folder, float16, of the averaged weights."""
    return write_weights(checkpoint_folder(work) / FILE_NAME, averaged_weights(training_file(work, NAME)))


def main() -> None:
    parser = training_parser(__doc__, minutes=20.0)
    parser.add_argument("--batch", type=int, default=BATCH, help=f"crops of {FRAMES} frames a step")
    parser.add_argument("--flow_mels", type=float, default=0.0, metavar="SHARE", help="of the mels")
    args = parser.parse_args()
    device = training_device()
    if device.type == "cuda":  # one pass over the activations instead of five, and two instead of twelve back
        hift.snake = torch.compile(hift.snake, dynamic=False)
    config, _, shapes = write_config(args.work)
    corpus = Corpus.load(args.work, device, shards=args.shards)
    print(f"{NAME}: {corpus.seconds / 3600:.2f} h of speech", flush=True)
    made = None
    if args.flow_mels:
        made = mels_of_flow(load_flow(args.work, config, shapes, device), args.work, corpus, config)
        print(f"{NAME}: {int(made.made.sum()) / LABEL_RATE / 3600:.2f} h as the flow makes it", flush=True)
    training = Training(config, corpus, args.batch, made=made, share=args.flow_mels)
    path = training_file(args.work, NAME)

    def check() -> str:
        test = Corpus.load(args.work, device, "test", args.shards)
        model = load_averaged(Hift(config.hift), path).to(device)
        return copy_synthesis(model, test, config.mel)

    spent = torch.load(path, map_location="cpu", weights_only=True)["minutes"] if path.exists() else 0.0
    shaping = min(args.minutes, max(0.0, SHAPING * args.total - spent))
    phases = [(training.shape, shaping), (training.compete, args.minutes - shaping)]
    phases = [(step, minutes) for step, minutes in phases if minutes > 0]
    for number, (step, minutes) in enumerate(phases, 1):
        at_end = check if number == len(phases) else None
        train(NAME, path, training.learners, step, training.draw, minutes, args.total, at_end)
    print(f"{NAME}: {export(args.work)}", flush=True)


if __name__ == "__main__":
    main()
