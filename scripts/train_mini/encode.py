"""What is said and who speaks, as the two models have it, of all that the teacher has spoken.

    python scripts/train_mini/encode.py [--work build/train_mini]

Writes codes.npz in the work folder: the same that the server makes of such a recording, but for rounding.
Utterances that are in it and not in the corpus stay.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from checkpoint import checkpoint_folder
from codes import Code, read_codes, write_codes
from corpus import LABEL_RATE, SAMPLE_RATE, Corpus
from devices import set_precision
from features import SPEECH_RATE, fbanks, resample
from speaker_encoder import SpeakerEncoder, load_encoder
from speech_tokenizer import SpeechTokenizer, load_tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from work import argument_parser

from light_tts.common.audio import resample as served_resample
from light_tts.models.cosyvoice2.frontend.features import whisper_log_mels
from light_tts.models.cosyvoice2.frontend.speaker import SpeakerEncoder as ServedEncoder
from light_tts.models.cosyvoice2.frontend.speech_tokenizer import SpeechTokenizer as ServedTokenizer

FRAME = SAMPLE_RATE // LABEL_RATE  # samples of a mel frame
BATCH = 128
COMPARED = 8  # utterances that are coded as the server does, too


@torch.no_grad()
def encode(corpus: Corpus, tokenizer: SpeechTokenizer, encoder: SpeakerEncoder) -> dict[str, Code]:
    """By the utterance's id. Utterances of about one length go together; each is what it is alone."""
    codes: dict[str, Code] = {}
    samples = corpus.samples.tolist()
    order = sorted(range(len(corpus)), key=samples.__getitem__)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        mels, banks = zip(*(_heard(corpus, row, samples[row]) for row in rows), strict=True)
        digits = tokenizer(pad_sequence(mels, True).transpose(1, 2), _lengths(mels, corpus.device))
        ids = tokenizer.ids(digits).cpu().numpy()
        embeddings = encoder(pad_sequence(banks, True), _lengths(banks, corpus.device)).cpu().numpy()
        for row, token, embedding, mel in zip(rows, ids, embeddings, mels, strict=True):
            # As many as there are, in the recording and in its mel spectrogram for the flow.
            length = min(-(-len(mel) // 4), samples[row] // FRAME // 2)
            codes[corpus.utterances[row]["id"]] = Code(token[:length], embedding)
    return codes


def _heard(corpus: Corpus, row: int, samples: int) -> tuple[Tensor, Tensor]:
    """What both models are given of one utterance: (frames, 128) and (frames, 80)."""
    index = torch.tensor([row], device=corpus.device)
    speech = resample(corpus.crops(index, torch.zeros_like(index), samples), SAMPLE_RATE)
    bank = fbanks(speech)[0]
    return whisper_log_mels(speech)[0].T, bank - bank.mean(0)


def _lengths(sequences: tuple[Tensor, ...], device: torch.device) -> Tensor:
    return torch.tensor([len(sequence) for sequence in sequences], device=device)


def difference_to_served(corpus: Corpus, codes: dict[str, Code], folder: Path) -> tuple[int, int, float]:
    """Of some utterances, with the exported models: tokens that are the same, all tokens, and the lowest
    cosine of two embeddings."""
    tokenizer, encoder = ServedTokenizer(folder), ServedEncoder(folder)
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


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    set_precision(fast=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, encoder = load_tokenizer(args.work, device), load_encoder(args.work, device)
    codes = read_codes(args.work)
    for split in ("train", "test"):
        corpus = Corpus.load(args.work, device, split)
        begun = time.monotonic()
        codes |= (found := encode(corpus, tokenizer, encoder))
        passed = time.monotonic() - begun
        same, tokens, cosine = difference_to_served(corpus, found, checkpoint_folder(args.work))
        print(
            f"{split}: {len(found)} utterances, {corpus.seconds / 3600:.2f} h in {passed:.1f} s; "
            f"{same} of {tokens} tokens as served, embeddings with a cosine of at least {cosine:.5f}",
            flush=True,
        )
    write_codes(args.work, codes)


if __name__ == "__main__":
    main()
