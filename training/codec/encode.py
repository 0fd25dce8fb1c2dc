"""Computes speech tokens and speaker embeddings of all of the teacher's speech.

    python -m training.codec.encode [--part 0/1] [--wait 0] [--work build/train_mini]

Writes codes/NNNNN.npz for each speech/NNNNN.npz in the work folder, equal to what the server computes for
such recordings except for rounding; and rooms/NNNNN.npz, likewise for some of them with simulated room
acoustics. Shards that already have codes are skipped. Several processes may run concurrently, each with a
part of the shards, and alongside generate.py with --wait.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from light_tts.common.audio import resample as served_resample
from light_tts.models.checkpoint.cosyvoice2_config import Config
from light_tts.models.frontend.features import whisper_log_mels
from light_tts.models.frontend.speaker import OnnxSpeakerEncoder
from light_tts.models.frontend.speech_tokenizer import OnnxSpeechTokenizer
from training.checkpoint import checkpoint_folder, write_config
from training.codec.codes import Code, Room, codes_file, rooms_file, write_codes, write_rooms
from training.codec.features import SPEECH_RATE, fbanks, resample
from training.codec.mels import token_mel
from training.codec.speaker_encoder import SpeakerEncoder, load_encoder
from training.codec.speech_tokenizer import SpeechTokenizer, load_tokenizer
from training.corpus.corpus import LABEL_RATE, SAMPLE_RATE, Corpus, speech_files
from training.corpus.generate import SHARD
from training.corpus.packages import phoneme_ids
from training.corpus.rooms import in_a_room
from training.devices import set_precision
from training.work import argument_parser, read_lines

FRAME = SAMPLE_RATE // LABEL_RATE  # samples per mel frame
BATCH = 32
COMPARED = 8  # number of utterances that are compared with the server's encoding
IN_ROOMS = 0.3  # fraction of utterances


class Coder:
    """Both models."""

    def __init__(self, tokenizer: SpeechTokenizer, encoder: SpeakerEncoder, config: Config) -> None:
        self._tokenizer, self._encoder, self._config = tokenizer, encoder, config

    @torch.no_grad()
    def codes(self, waves: Sequence[Tensor]) -> list[Code]:
        """waves: (samples,) float32 each. Those of similar length share a batch; the result is the same as
        for each alone."""
        codes: dict[int, Code] = {}
        order = sorted(range(len(waves)), key=lambda number: len(waves[number]))
        for start in range(0, len(order), BATCH):
            numbers = order[start : start + BATCH]
            mels, banks = zip(*(_features(waves[number]) for number in numbers), strict=True)
            digits = self._tokenizer(pad_sequence(mels, True).transpose(1, 2), _lengths(mels))
            ids = self._tokenizer.ids(digits).cpu().numpy()
            embeddings = self._encoder(pad_sequence(banks, True), _lengths(banks)).cpu().numpy()
            for number, token, embedding, mel in zip(numbers, ids, embeddings, mels, strict=True):
                # As many as there are, in the recording and in its mel spectrogram for the flow.
                length = min(-(-len(mel) // 4), len(waves[number]) // FRAME // 2)
                codes[number] = Code(token[:length], embedding)
        return [codes[number] for number in range(len(waves))]

    def rooms(self, waves: Sequence[Tensor]) -> list[Room]:
        """waves: with room acoustics."""
        found = []
        for wave, code in zip(waves, self.codes(waves), strict=True):
            mel = token_mel(wave, len(code.speech_token), self._config).half().cpu().numpy()
            found.append(Room(Code(code.speech_token[: len(mel)], code.embedding), mel))
        return found

    def write(self, work: Path, shard: str, corpus: Corpus) -> dict[str, Code]:
        """Write both files of a shard; return the content of the first. corpus: its speech."""
        names, waves = [utterance["id"] for utterance in corpus.utterances], list(corpus.waves())
        disturbed = {}
        for name, wave in zip(names, waves, strict=True):
            random = np.random.default_rng(zlib.crc32(name.encode()))
            if random.random() < IN_ROOMS:
                disturbed[name] = in_a_room(wave, random)
        if disturbed:
            rooms = self.rooms(list(disturbed.values()))
            write_rooms(rooms_file(work, shard), dict(zip(disturbed, rooms, strict=True)))
        codes = dict(zip(names, self.codes(waves), strict=True))
        write_codes(codes_file(work, shard), codes)
        return codes


def _features(wave: Tensor) -> tuple[Tensor, Tensor]:
    """Return both models' input for one utterance: (frames, 128) and (frames, 80)."""
    speech = resample(wave[None], SAMPLE_RATE)
    bank = fbanks(speech)[0]
    return whisper_log_mels(speech)[0].T, bank - bank.mean(0)


def _lengths(sequences: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(sequence) for sequence in sequences], device=sequences[0].device)


def difference_to_served(corpus: Corpus, codes: dict[str, Code], folder: Path) -> tuple[int, int, float]:
    """Compare some utterances with the exported models. Returns the number of equal tokens, the number of all
    tokens, and the lowest cosine of two embeddings."""
    tokenizer, encoder = OnnxSpeechTokenizer(folder), OnnxSpeakerEncoder(folder)
    same, tokens, cosine = 0, 0, 1.0
    for row in np.linspace(0, len(corpus) - 1, min(COMPARED, len(corpus))).astype(int).tolist():
        first = int(corpus.start[row])
        wave = corpus.wave[first : first + int(corpus.samples[row])].cpu().numpy().astype(np.float32) / 32768
        speech, code = served_resample(wave, SAMPLE_RATE, SPEECH_RATE), codes[corpus.utterances[row]["id"]]
        served = tokenizer(speech)[: len(code.speech_token)]
        same, tokens = same + int((served == code.speech_token).sum()), tokens + len(served)
        other = encoder(speech)
        norms = np.linalg.norm(other) * np.linalg.norm(code.embedding)
        cosine = min(cosine, float(other @ code.embedding / norms))
    return same, tokens, cosine


def part(text: str) -> tuple[int, int]:
    """Parse "I/N": every Nth shard, starting with number I."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0/2 or 1/2")
    return int(number), int(parts)


def missing(work: Path, number: int, parts: int) -> list[Path]:
    """Return the shards of this part that have no codes yet."""
    return [
        file
        for file in speech_files(work)
        if int(file.stem) % parts == number and not codes_file(work, file.name).exists()
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--part", type=part, default=(0, 1), help="I/N: every Nth shard, from the Ith on")
    parser.add_argument("--wait", type=float, default=0.0, help="minutes, for speech that is not there yet")
    args = parser.parse_args()
    set_precision(fast=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, _, _ = write_config(args.work)
    coder = Coder(load_tokenizer(args.work, device), load_encoder(args.work, device), config)
    known, phonemes = {u["id"]: u for u in read_lines(args.work / "utterances.jsonl")}, phoneme_ids(args.work)
    number, parts = args.part
    left = len(range(number, -(-len(known) // SHARD), parts))
    left -= sum(int(file.stem) % parts == number for file in (args.work / "codes").glob("?????.npz"))
    begun, hours, corpus = time.monotonic(), 0.0, None
    while True:
        for file in missing(args.work, number, parts):
            corpus = Corpus.read([file], known, phonemes, device)
            codes = coder.write(args.work, file.name, corpus)
            hours, left = hours + corpus.seconds / 3600, left - 1
            print(f"{file.stem}: {hours:.2f} h after {time.monotonic() - begun:.0f} s", flush=True)
        if left <= 0 or time.monotonic() - begun > 60 * args.wait:
            break
        time.sleep(1.0)
    folder = checkpoint_folder(args.work)
    if corpus and (folder / OnnxSpeakerEncoder.FILE_NAME).exists():
        same, tokens, cosine = difference_to_served(corpus, codes, folder)
        print(
            f"{same} of {tokens} tokens as served, embeddings with a cosine of at least {cosine:.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
