"""Trains the speaker encoder, which represents the speaker by 192 values.

    python -m training.codec.speaker_encoder [--minutes 2] [--work build/train_mini]

Writes training/speaker_encoder.pt and checkpoint/campplus.onnx in the work folder (CosyVoice2's file name,
but another network). It learns to distinguish the training speakers with an angular margin loss (Deng et al.
2019, "ArcFace"); generalization is measured with held-out speakers.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.flow.unet.estimator import ChannelNorm
from light_tts.models.frontend.speaker import OnnxSpeakerEncoder
from training.checkpoint import checkpoint_folder, training_file
from training.codec.convnext import ConvNeXt, frame_mask
from training.codec.features import FBANK_HOP, FBANK_MELS, FBANK_SAMPLES, SPEECH_RATE, fbanks, resample
from training.corpus.corpus import SAMPLE_RATE, Corpus
from training.corpus.crops import Crops, disturbed, tilted
from training.devices import mixed_precision, set_precision, training_device
from training.loop import Learner, averaged_weights, train, training_parser
from training.onnx.half import part_of, rounded, write_onnx

NAME = "speaker_encoder"
SIZE = 192
WIDTH, HIDDEN, KERNEL, BLOCKS = 192, 384, 7, 4
POOLED, ATTENTION = 384, 64

FRAME_RATE = SPEECH_RATE // FBANK_HOP
SHORTEST, LONGEST = 2.0, 4.0  # seconds
BATCH = 192
RATE = 1e-3
MARGIN, SCALE = 0.2, 30.0  # radians; scale of the cosines
PROMPT = 3.0  # seconds used for evaluation


class SpeakerEncoder(nn.Module):
    """ConvNeXt blocks at 50 frames per second, followed by attentive mean and standard deviation over time
    (Okabe et al. 2018, "Attentive statistics pooling")."""

    def __init__(self) -> None:
        super().__init__()
        self.to_50 = nn.Conv1d(FBANK_MELS, WIDTH, 5, stride=2, padding=2)
        self.norm_50 = ChannelNorm(WIDTH)
        self.blocks = nn.ModuleList(ConvNeXt(WIDTH, HIDDEN, KERNEL) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.pooled = nn.Linear(WIDTH, POOLED)
        self.attention = nn.Sequential(nn.Linear(POOLED, ATTENTION), nn.Tanh(), nn.Linear(ATTENTION, POOLED))
        self.out = nn.Linear(2 * POOLED, SIZE)

    def forward(self, fbank: Tensor, frames: Tensor | None = None) -> Tensor:
        """fbank: (batch, frames, 80), 100 per second, mean subtracted; frames: (batch,) number of valid
        frames -> (batch, SIZE)"""
        x, mask = fbank.transpose(1, 2), None
        if frames is not None:
            x = x * frame_mask(frames, x.shape[2])
            mask = frame_mask((frames + 1) // 2, (x.shape[2] + 1) // 2)
        x = self.norm_50(self.to_50(x))
        for block in self.blocks:
            x = block(x, mask)
        x = F.gelu(self.pooled(self.norm(x.transpose(1, 2))))
        weight = self.attention(x).float()
        if mask is not None:
            weight = weight.masked_fill(mask.transpose(1, 2) == 0, -1e4)
        weight, x = weight.softmax(1), x.float()
        mean = (weight * x).sum(1)
        spread = (weight * (x - mean[:, None]).square()).sum(1).clamp(min=1e-5).sqrt()
        return self.out(torch.cat([mean, spread], 1)).float()


class TaughtEncoder(nn.Module):
    """The encoder with one direction per training speaker."""

    def __init__(self, speakers: int) -> None:
        super().__init__()
        self.encoder = SpeakerEncoder()
        self.directions = nn.Parameter(torch.randn(speakers, SIZE) / SIZE**0.5)


def margin_loss(embedding: Tensor, directions: Tensor, speaker: Tensor) -> tuple[Tensor, Tensor]:
    """embedding: (batch, SIZE); directions: (speakers, SIZE); speaker: (batch,) -> loss, accuracy"""
    cosine = F.normalize(embedding.float()) @ F.normalize(directions.float()).T
    angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    own = speaker[:, None] == torch.arange(len(directions), device=speaker.device)
    loss = F.cross_entropy(SCALE * (angle + MARGIN * own).cos(), speaker)
    return loss, (cosine.argmax(1) == speaker).float().mean()


def centred(fbank: Tensor, frames: Tensor) -> Tensor:
    """fbank: (batch, frames, 80) -> minus the mean of the first `frames` (batch,) of each."""
    mask = frame_mask(frames, fbank.shape[1]).transpose(1, 2)
    return fbank - (fbank * mask).sum(1, keepdim=True) / frames[:, None, None]


def fbank_frames(samples: Tensor) -> Tensor:
    """Return the number of frames for this number of corpus samples."""
    speech = (samples * SPEECH_RATE + SAMPLE_RATE - 1) // SAMPLE_RATE
    return 1 + (speech - FBANK_SAMPLES) // FBANK_HOP


def normalised_fbanks(wave: Tensor) -> Tensor:
    """wave: (batch, samples) of the corpus -> (batch, frames, 80), mean subtracted"""
    fbank = fbanks(resample(wave, SAMPLE_RATE))
    return fbank - fbank.mean(1, keepdim=True)


def load_encoder(work: Path, device: torch.device) -> SpeakerEncoder:
    """Return the trained encoder, with the weights of the exported file."""
    module = SpeakerEncoder()
    module.load_state_dict(part_of(averaged_weights(training_file(work, NAME)), "encoder"))
    return rounded(module).to(device).eval()


def export_encoder(encoder: SpeakerEncoder, path: Path) -> None:
    """input (1, frames, 80) float32 -> output (1, SIZE)"""
    example = torch.randn(1, 101, FBANK_MELS)
    write_onnx(encoder, (example,), ["input"], "output", {"input": {1: "frames"}}, path)


def export(work: Path) -> Path:
    """Export the trained encoder to the checkpoint."""
    path = checkpoint_folder(work) / OnnxSpeakerEncoder.FILE_NAME
    export_encoder(load_encoder(work, torch.device("cpu")), path)
    return path


def equal_error_rate(same: Tensor, different: Tensor) -> float:
    """Return the equal error rate of pair similarities: the rate at which false rejections equal false
    acceptances."""
    limits = torch.cat([same, different]).sort().values
    rejected = torch.searchsorted(same.sort().values, limits) / len(same)
    accepted = 1 - torch.searchsorted(different.sort().values, limits) / len(different)
    place = (rejected - accepted).abs().argmin()
    return float((rejected + accepted)[place] / 2)


@torch.no_grad()
def check(encoder: SpeakerEncoder, corpus: Corpus) -> str:
    """Return how well it distinguishes held-out speakers from PROMPT seconds of each recording."""
    samples = int(PROMPT * SAMPLE_RATE)
    found, whole = [], []
    for number, length in enumerate(corpus.samples.tolist()):
        index = torch.tensor([number], device=corpus.device)
        wave = corpus.crops(index, torch.zeros_like(index), length)
        whole.append(encoder(normalised_fbanks(wave)))
        found.append(encoder(normalised_fbanks(wave[:, :samples])))
    found, whole = F.normalize(torch.cat(found)), F.normalize(torch.cat(whole))
    cosine = found @ found.T
    pairs = torch.ones_like(cosine, dtype=torch.bool).triu(1)
    together = corpus.speaker[:, None] == corpus.speaker
    same, different = cosine[pairs & together], cosine[pairs & ~together]
    return (
        f"held-out speakers by {PROMPT:g} s: cosine {same.mean():.3f} of the same, {different.mean():.3f} of "
        f"different ones, equal error rate {equal_error_rate(same, different):.1%}; "
        f"cosine {(found * whole).sum(1).mean():.3f} to the whole recording"
    )


def main() -> None:
    args = training_parser(__doc__, minutes=2.0).parse_args()
    device, path = training_device(), training_file(args.work, NAME)
    corpus = Corpus.load(args.work, device, shards=args.shards)
    print(f"{NAME}: {corpus.seconds / 3600:.2f} h, {len(corpus.speakers)} speakers", flush=True)
    taught = TaughtEncoder(len(corpus.speakers)).to(device)
    learner = Learner(taught, RATE)
    # between the mean weighted by number of recordings and the unweighted mean
    spoken = torch.zeros(len(corpus.speakers), device=device).index_add_(
        0, corpus.speaker, corpus.samples.float()
    )
    samples = int(LONGEST * SAMPLE_RATE)
    crops = Crops(corpus, corpus.samples / spoken[corpus.speaker].sqrt(), samples, margin=0)

    def step(index: Tensor, begin: Tensor) -> dict[str, Tensor]:
        wave = resample(corpus.crops(index, begin, samples), SAMPLE_RATE)
        fbank = fbanks(disturbed(tilted(wave)))
        frames = torch.randint(int(SHORTEST * FRAME_RATE), fbank.shape[1] + 1, index.shape, device=device)
        frames = frames.minimum(fbank_frames(corpus.samples[index]))
        with mixed_precision(device):
            embedding = taught.encoder(centred(fbank, frames), frames)
        loss, right = margin_loss(embedding, taught.directions, corpus.speaker[index])
        norm = learner.learn(loss)
        return {"loss": loss.detach(), "right": right, "norm": norm}

    def finish() -> str:
        set_precision(fast=False)
        export(args.work)
        encoder = load_encoder(args.work, device)
        return check(encoder, Corpus.load(args.work, device, "test", args.shards))

    train(NAME, path, {"model": learner}, step, lambda: crops.draw(BATCH), args.minutes, args.total, finish)


if __name__ == "__main__":
    main()
