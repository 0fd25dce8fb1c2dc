"""Trains the flow: speech tokens to mel spectrograms, by conditional flow matching along straight paths.

    python -m training.flow.flow_matching [--minutes 12] [--total 12] [--work build/train_mini]

Requires speech and codes in the work folder; resumes where the last run ended; writes flow.pt of the
checkpoint and prints the quality on held-out speakers.

The path from noise z to the mel x is y = (1 - (1 - sigma) t) z + t x, and the network learns its velocity x -
(1 - sigma) z (Lipman et al. 2023, section 4.1), more often at small t than at large ones (CosyVoice, Du et
al. 2024, section 2.3). The loss is squared, because its minimum is the mean velocity, along which the
integration must proceed; the minimum of the absolute loss would be the median. Some items have no tokens,
speaker and prompt, for the guidance.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from light_tts.models.flow.encoder import RelativeAttention
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.masks import EstimatorMasks, length_mask
from training.checkpoint import checkpoint_folder, training_file, write_config, write_weights
from training.codec.speech_tokenizer import DIGITS, LEVELS
from training.devices import mixed_precision, training_device
from training.flow.items import Items, PairedSpeech, misheard
from training.loop import Learner, averaged_weights, train, training_parser

BATCH, ROW_TOKENS = 40, 384  # rows of 15.4 s
RATE = 1e-3
CHECKED, CHECKED_BATCHES = 16, 4  # evaluated items and batches
SIGMA = 1e-6
UNCONDITIONED = 0.2
# The encoder's output and the speaker together are trained as a first estimate of the mel, as in Grad-TTS
# (Popov et al. 2021, section 3.4), so that the encoder learns from the first step on and not only through the
# estimator.
GUESS_WEIGHT = 0.1
# attention kernels with a mask and a gradient
ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def flow_losses(flow: Flow, items: Items, variance: Tensor) -> dict[str, Tensor]:
    """Return the errors of the velocity and of the first estimate, both relative to the mel's `variance`."""
    rows, _, frames = items.mel.shape
    features, length = flow.encode(
        items.token, items.length, items.streaming, items.complete, longest=items.token.shape[1]
    )
    mu = flow.encoder_proj(features).transpose(1, 2)
    speaker = flow.speaker(items.embedding)
    chunk = torch.where(items.streaming, flow.decoder.chunk_size, frames)
    masks = EstimatorMasks.build(length, frames, chunk, mu.dtype)

    def error(found: Tensor, target: Tensor) -> Tensor:
        squared = (found.float() - target).square() * masks.frames
        return squared.sum() / (masks.frames.float().sum() * target.shape[1] * variance)

    noise = torch.randn_like(items.mel)
    time = 1 - torch.cos(0.5 * math.pi * torch.rand(rows, device=noise.device))
    t = time[:, None, None]
    path = (1 - (1 - SIGMA) * t) * noise + t * items.mel
    kept = (torch.rand(rows, device=noise.device) >= UNCONDITIONED)[:, None].to(mu.dtype)
    velocity = flow.decoder.estimator(
        path, masks, mu * kept[..., None], time, speaker * kept, items.known * kept[..., None]
    )
    return {
        "velocity": error(velocity, items.mel - (1 - SIGMA) * noise),
        "guess": error(mu + speaker[..., None], items.mel),
    }


def initialise(flow: Flow, mel_mean: Tensor) -> None:
    """mel_mean: (mels,). Initialize both outputs near the mean mel, about -6, because the format has no
    normalization."""
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, RelativeAttention):
                module.pos_bias_u.zero_()
                module.pos_bias_v.zero_()
        flow.encoder_proj.bias.copy_(mel_mean)
        flow.decoder.estimator.final_proj.bias.copy_(mel_mean)


def mel_statistics(speech: PairedSpeech) -> tuple[Tensor, Tensor]:
    """Return the mean of each mel (mels,), and the total variance around it, a scalar."""
    mel = speech.mel[:100_000].float().flatten(0, 1)
    return mel.mean(0), mel.var(0).mean()


@torch.no_grad()
def evaluate(flow: Flow, speech: PairedSpeech, variance: Tensor) -> str:
    """Return the losses and the error of generated mels, on the same items every time."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    batches = [
        flow_losses(flow, speech.items(speech.draw(CHECKED, draw)), variance) for _ in range(CHECKED_BATCHES)
    ]
    text = [f"{name} {sum(float(b[name]) for b in batches) / len(batches):.4f}" for name in batches[0]]
    second = np.arange(len(speech))
    first = speech.other(second, draw)
    pairs = [(int(a), int(b)) for a, b in zip(first, second, strict=True) if a != b][:CHECKED]
    if pairs:
        for name, streaming in (("whole", False), ("in chunks", True)):
            text.append(f"mel error {name} {mel_error(flow, speech, pairs, streaming):.3f}")
    return ", ".join(text)


def mel_error(flow: Flow, speech: PairedSpeech, pairs: list[tuple[int, int]], streaming: bool) -> float:
    """Return the mean absolute error of the natural log mels generated in ten steps. pairs: of recordings;
    the first is the prompt of the second."""

    def padded(values: list[Tensor]) -> tuple[Tensor, Tensor]:
        sizes = torch.tensor([len(value) for value in values], device=speech.device)
        return pad_sequence(values, batch_first=True), sizes

    prompts, spoken = ([speech.recording(part) for part in parts] for parts in zip(*pairs, strict=True))
    prompt_token, prompt_size = padded([token for token, _ in prompts])
    prompt_mel, _ = padded([mel for _, mel in prompts])
    token, size = padded([token for token, _ in spoken])
    target, frames = padded([mel for _, mel in spoken])
    embedding = speech.embedding[[first for first, _ in pairs]]
    mel, _ = flow.inference(
        token, size, prompt_token, prompt_size, prompt_mel, embedding, streaming, finalize=True
    )
    inside = length_mask(frames, target.shape[1])
    return float((mel.transpose(1, 2) - target).abs()[inside].mean())


def export(work: Path) -> Path:
    """Write flow.pt of the checkpoint: the averaged weights as float16."""
    write_config(work)
    target = checkpoint_folder(work) / "flow.pt"
    state = averaged_weights(training_file(work, "flow"), "flow")
    return write_weights(target, state)


def main() -> None:
    parser = training_parser(__doc__, minutes=12)
    args = parser.parse_args()
    device = training_device()
    config, _, shapes = write_config(args.work)
    speech = PairedSpeech.load(args.work, config, device, ROW_TOKENS, shards=args.shards)
    print(f"flow: {len(speech)} recordings, {len(speech.token) / config.token_frame_rate / 3600:.1f} h")
    mean, variance = mel_statistics(speech)
    flow = Flow(config.flow, shapes).to(device)
    initialise(flow, mean)
    learner = Learner(flow, RATE, betas=(0.9, 0.99))
    draw = np.random.default_rng()
    places = (LEVELS ** torch.arange(DIGITS)).to(device)

    def step(chosen: Tensor) -> dict[str, Tensor]:
        items = speech.items(chosen)
        items = replace(items, token=misheard(items.token, places))
        with (
            mixed_precision(device),
            sdpa_kernel(ATTENTION),
        ):
            losses = flow_losses(flow, items, variance)
        norm = learner.learn(losses["velocity"] + GUESS_WEIGHT * losses["guess"])
        return {name: loss.detach() for name, loss in losses.items()} | {"norm": norm}

    path = training_file(args.work, "flow")
    train(
        "flow",
        path,
        {"flow": learner},
        step,
        lambda: [speech.draw(BATCH, draw)],
        args.minutes,
        args.total,
    )
    print(f"flow: {export(args.work)}", flush=True)
    exported = Flow.from_checkpoint(checkpoint_folder(args.work), config, device)
    test = PairedSpeech.load(args.work, config, device, ROW_TOKENS, "test")
    print(f"flow: speakers that it was not trained on: {evaluate(exported, test, variance)}", flush=True)


if __name__ == "__main__":
    main()
