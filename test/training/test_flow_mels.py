"""training/vocoder/flow_mels.py: the mels that the flow makes for the vocoder's training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.flow.flow import Flow
from training.codec.codes import Code, write_codes
from training.corpus.corpus import Corpus
from training.flow.items import PairedSpeech
from training.vocoder.flow_mels import FlowMels, finished, flow_mels

GOLDEN = Path("test/golden/cosyvoice2/checkpoint")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flow() -> Flow:
    return Flow.from_checkpoint(GOLDEN, load_config(GOLDEN), CPU)


@pytest.mark.parametrize("streaming", [False, True])
def test_without_steps_left_out_it_is_the_inference(flow, streaming):
    draw = np.random.default_rng(0)
    codes = [Code(draw.integers(0, 20, 70), np.ones(192, np.float32)) for _ in range(2)]
    mels = [torch.randn(70, 2, 80).half() for _ in codes]
    speech = PairedSpeech(codes, mels, ["anna"] * 2, 256)
    items = speech.items(speech.pairs(np.array([1]), draw))
    tokens = int(items.length)
    prompt = tokens - 70
    expected, _ = flow.inference(
        items.token[:, prompt:tokens],
        torch.tensor([70]),
        items.token[:, :prompt],
        torch.tensor([prompt]),
        items.known[:, :, : 2 * prompt].transpose(1, 2),
        items.embedding,
        streaming,
        finalize=True,
    )
    found = finished(flow, items, 0, streaming)[:, :, 2 * prompt : 2 * tokens]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    # Begun at the end of the path, where there is no noise any more, it is the mel that was given.
    nearly = finished(flow, items, len(flow.decoder.steps) - 1, streaming)[:, :, 2 * prompt : 2 * tokens]
    given = items.mel[:, :, 2 * prompt : 2 * tokens]
    assert (nearly - given).abs().mean() < (expected - given).abs().mean()


def test_each_utterance_with_codes_has_its_mel_in_its_place(flow, tmp_path):
    """Utterances of 60, 40 and 20 tokens; the last has no codes."""
    draw = np.random.default_rng(0)
    sizes = (60, 40, 20)
    waves = [(draw.standard_normal(size * 960) * 3000).astype(np.int16) for size in sizes]
    labels = [(np.zeros(2 * size, np.int64), np.zeros(2 * size, np.float32)) for size in sizes]
    corpus = Corpus([{"id": name, "speaker": "a"} for name in "xyz"], waves, labels, CPU)
    (tmp_path / "codes").mkdir()
    codes = {
        name: Code(draw.integers(0, 20, size), np.ones(192, np.float32))
        for name, size in zip("xy", sizes, strict=False)
    }
    write_codes(tmp_path / "codes" / "00000.npz", codes)
    made = flow_mels(flow, tmp_path, corpus, load_config(GOLDEN))
    assert made.made.tolist() == [120, 80, 0]
    assert made.mel[:200].float().abs().sum(1).min() > 0
    assert made.mel[200:].abs().sum() == 0


def test_a_crop_is_whole_or_not_taken():
    mel = torch.arange(10.0)[:, None].repeat(1, 80).half()
    made = FlowMels(mel, start=torch.tensor([0, 6]), made=torch.tensor([6, 3]))
    index, begin = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 3, -1, 0])
    crops, whole = made.crops(index, begin, 3)
    assert whole.tolist() == [True, True, False, True]
    assert crops[:, 0].tolist()[0] == [2, 3, 4]
    assert crops[:, 0].tolist()[3] == [6, 7, 8]
    later = replace(made, made=torch.tensor([5, 3])).crops(index, begin, 3)[1]
    assert later.tolist() == [True, False, False, True]
