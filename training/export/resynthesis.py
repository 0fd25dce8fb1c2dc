"""Passes test speech through the checkpoint's components one by one, to listen to and measure the loss of
each.

    python -m training.export.resynthesis [--count 40] [--work build/train_mini]

Writes resynthesis/<stage>/ in the work folder, a WAV for each utterance and list.jsonl, which
`scripts/evaluate.py --wavs` reads:

    teacher    the teacher's speech
    vocoder    its mel spectrogram through the vocoder
    flow       its speech tokens through flow and vocoder, with another utterance of the speaker as prompt
"""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from light_tts.models.checkpoint.cosyvoice2_config import Config, load_config
from light_tts.models.flow.flow import Flow
from light_tts.models.frontend.features import flow_mels
from light_tts.models.vocoder.hift import Hift
from training.checkpoint import checkpoint_folder
from training.codec.codes import Code, read_codes
from training.codec.mels import token_mel
from training.corpus.corpus import SAMPLE_RATE, Corpus
from training.work import argument_parser

RUNGS = ("teacher", "vocoder", "flow")


class Resynthesis:
    """The components of a checkpoint."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.config: Config = load_config(folder)
        self._flow = Flow.from_checkpoint(folder, self.config, device)
        self._hift = Hift.from_checkpoint(folder, self.config, device)

    def vocoder(self, signal: Tensor) -> Tensor:
        """signal: (samples,) -> (approximately as many samples,)"""
        return self._spoken(flow_mels(signal[None], self.config.mel))

    def flow(self, spoken: Code, prompt: Code, prompt_signal: Tensor) -> Tensor:
        """spoken: only its tokens are used; prompt_signal: (samples,) -> (samples,)"""
        device = prompt_signal.device
        prompt_mel = token_mel(prompt_signal, len(prompt.speech_token), self.config)
        tokens = [
            torch.from_numpy(values)[None].to(device)
            for values in (spoken.speech_token, prompt.speech_token[: len(prompt_mel)])
        ]
        (token, token_size), (prompt_token, prompt_size) = (
            (value, torch.tensor([value.shape[1]], device=device)) for value in tokens
        )
        embedding = torch.from_numpy(prompt.embedding)[None].to(device)
        known = prompt_mel.flatten(0, 1)[None]
        mel, _ = self._flow.inference(
            token, token_size, prompt_token, prompt_size, known, embedding, streaming=False, finalize=True
        )
        return self._spoken(mel)

    def _spoken(self, mel: Tensor) -> Tensor:
        """mel: (1, mels, frames) -> (samples,), with the same source noise as the server."""
        samples = mel.shape[2] * self._hift.samples_per_frame
        noise = torch.randn(1, samples, self._hift.m_source.waves, device=mel.device)
        return self._hift.inference(mel, [mel.shape[2]], noise=noise)[0][0]


def with_prompts(corpus: Corpus, known: dict[str, Code]) -> list[tuple[int, int]]:
    """Return the utterances that have codes, each with the previous one by the same speaker; the first gets
    the last."""
    own: dict[str, list[int]] = {}
    for number, utterance in enumerate(corpus.utterances):
        if utterance["id"] in known:
            own.setdefault(utterance["speaker"], []).append(number)
    pairs = [
        (number, row[place - 1]) for row in own.values() if len(row) > 1 for place, number in enumerate(row)
    ]
    return sorted(pairs)


def write_wave(path: Path, signal: Tensor) -> None:
    """signal: (samples,) float32 -> 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((signal.cpu().numpy().clip(-1, 1) * 32767).astype(np.int16).tobytes())


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=40, help="utterances")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    parts = Resynthesis(checkpoint_folder(args.work), device)
    corpus = Corpus.load(args.work, torch.device("cpu"), "test")
    known = read_codes(args.work)
    waves = list(corpus.waves())
    out = args.work / "resynthesis"
    for name in (*RUNGS, "prompts"):
        (out / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, prompt_number in with_prompts(corpus, known)[: args.count]:
        utterance, prompt = corpus.utterances[number], corpus.utterances[prompt_number]
        signal, prompt_signal = waves[number].to(device), waves[prompt_number].to(device)
        file = f"{utterance['id']}.wav"
        write_wave(out / "prompts" / file, prompt_signal)
        write_wave(out / "teacher" / file, signal)
        write_wave(out / "vocoder" / file, parts.vocoder(signal))
        spoken = parts.flow(known[utterance["id"]], known[prompt["id"]], prompt_signal)
        write_wave(out / "flow" / file, spoken)
        line = {"wav": file, "text": utterance["text"], "voice": utterance["speaker"]}
        lines.append({**line, "prompt_wav": f"../prompts/{file}", "prompt_text": prompt["text"]})
    for name in RUNGS:
        with (out / name / "list.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    print(f"{out}: {len(lines)} utterances, {', '.join(RUNGS)}")


if __name__ == "__main__":
    main()
