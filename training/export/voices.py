"""The voices bundled with the checkpoint: recordings of the teacher with transcripts, and their entries in
spk2info.pt, so that clients can select them by name.

    python -m training.export.voices [--work build/train_mini]

Requires the exported speech tokenizer, speaker encoder and text tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch

from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.frontend.frontend import Frontend
from light_tts.models.frontend.speaker import SPEAKERS_FILE
from training.checkpoint import checkpoint_folder
from training.corpus.packages import voices_folder
from training.corpus.sentences import phonemizer
from training.corpus.speakers import Speaker, style
from training.corpus.teacher import SAMPLE_RATE, Teacher
from training.work import argument_parser

# Name -> the teacher's voice, and its text: four seconds of simple words.
VOICES = {
    "anna": ("af_heart", "The river was calm this morning, and a few boats were on their way to the sea."),
    "henry": ("am_michael", "We walked through the old town, and stopped for a coffee near the market."),
}


def record(work: Path, folder: Path) -> None:
    """Write NAME.wav and NAME.txt of every voice."""
    teacher, phonemize = Teacher(work, torch.device("cpu")), phonemizer(work)
    for name, (voice, text) in VOICES.items():
        spoken = teacher.speak(
            phonemize(text), style(voices_folder(work), Speaker(name, "plain", {voice: 1.0}))
        )
        soundfile.write(folder / f"{name}.wav", spoken.wave.clip(-1, 1), SAMPLE_RATE, subtype="PCM_16")
        (folder / f"{name}.txt").write_text(f"{text}\n", "utf-8")


def stored(frontend: Frontend, recording: Path) -> dict[str, torch.Tensor]:
    """Return the spk2info.pt entry of a recording whose transcript is next to it."""
    samples, rate = soundfile.read(recording, dtype="float32")
    features = frontend.features(samples, rate)
    text = frontend.prompt_text(recording.with_suffix(".txt").read_text("utf-8").strip())
    token = torch.from_numpy(features.speech_token)[None]
    embedding = torch.from_numpy(features.embedding)[None]

    def length(count: int) -> torch.Tensor:
        return torch.tensor([count], dtype=torch.int32)

    return {
        "prompt_text": torch.tensor([text.ids], dtype=torch.int32),
        "prompt_text_len": length(len(text.ids)),
        "llm_prompt_speech_token": token,
        "llm_prompt_speech_token_len": length(token.shape[1]),
        "flow_prompt_speech_token": token,
        "flow_prompt_speech_token_len": length(token.shape[1]),
        "prompt_speech_feat": torch.from_numpy(np.array(features.mel))[None],
        "prompt_speech_feat_len": length(len(features.mel)),
        "llm_embedding": embedding,
        "flow_embedding": embedding,
    }


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    model_dir = checkpoint_folder(args.work)
    folder = model_dir / "voices"
    folder.mkdir(exist_ok=True)
    if not all((folder / f"{name}.wav").exists() for name in VOICES):
        record(args.work, folder)
    (model_dir / SPEAKERS_FILE).unlink(missing_ok=True)  # it may belong to another tokenizer
    frontend = Frontend(model_dir, load_config(model_dir))
    entries = {name: stored(frontend, folder / f"{name}.wav") for name in VOICES}
    torch.save(entries, model_dir / SPEAKERS_FILE)
    for name, entry in entries.items():
        print(f"{name}: {entry['flow_prompt_speech_token'].shape[1]} speech tokens")


if __name__ == "__main__":
    main()
