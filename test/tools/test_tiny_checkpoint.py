import subprocess
import sys
from pathlib import Path

import pytest
import torch

from light_tts.models.family import load_family
from light_tts.tools.tiny_checkpoint import main

CPU = torch.device("cpu")


def make(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/make_tiny_checkpoint.py", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module", params=["cosyvoice2", "cosyvoice3"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "tiny"
    result = make(out, "--family", family, "--seed", "3")
    assert result.returncode == 0, result.stderr
    return out


def test_the_checkpoint_loads_through_the_real_loaders(checkpoint):
    family = load_family(checkpoint)
    frontend = family.load_frontend({}, 1)
    assert sorted(frontend.speakers) == ["embedded_voice", "recorded_voice"]
    lm = family.load_llm(checkpoint / "llm.pt", CPU, torch.float32)
    assert len(frontend.tokenizer) <= lm.backbone.vocab_size


def test_it_makes_a_wave_with_a_human_pitch_that_is_neither_silent_nor_clipped(checkpoint):
    family = load_family(checkpoint)
    flow, hift = family.read_flow(), family.read_vocoder()
    voice = family.load_frontend({}, 1).speakers["recorded_voice"].features
    prompt = torch.from_numpy(voice.speech_token).long()[None]
    mel, _ = flow.inference(
        torch.arange(50)[None],
        torch.tensor([50]),
        prompt,
        torch.tensor([prompt.shape[1]]),
        torch.from_numpy(voice.mel)[None],
        torch.from_numpy(voice.embedding)[None],
        streaming=False,
        finalize=True,
    )
    sizes = [[mel.shape[2]]] if family.name == "CosyVoice2" else []
    pitch = hift.f0(mel, *sizes)
    assert pitch.min() > 80 and pitch.max() < 300
    wave, _ = hift.inference(mel, *sizes)
    assert wave.isfinite().all() and 0.01 < wave.std() < 0.3
    assert (wave.abs() > 0.98).float().mean() < 0.01


def test_the_same_seed_makes_the_same_weights(checkpoint, family, tmp_path, monkeypatch):
    """In other processes, too: that of the script has made the first checkpoint."""
    for name, seed in (("again", "3"), ("other", "4")):
        options = ["--out", str(tmp_path / name), "--family", family, "--seed", seed]
        monkeypatch.setattr(sys, "argv", ["make_tiny_checkpoint.py", *options])
        main()
    for name in ("llm.pt", "flow.pt", "hift.pt"):
        one, same, other = (
            torch.load(folder / name, weights_only=True)
            for folder in (checkpoint, tmp_path / "again", tmp_path / "other")
        )
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert not all(torch.equal(one[key], other[key]) for key in one)


def test_a_directory_with_content_is_not_touched(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("x")
    monkeypatch.setattr(sys, "argv", ["make_tiny_checkpoint.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="not an empty directory"):
        main()
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
