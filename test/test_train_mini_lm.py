"""The text tokenizer and the language model of scripts/train_mini, on made data."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts" / "train_mini"))

import language_model as training_of_lm
from checkpoint import END_OF_TEXT, MINI, checkpoint_folder, training_file, write_config
from language_model import (
    Packed,
    TrainedLM,
    export,
    heard,
    measured,
    training_layouts,
    training_step,
    with_noise,
)
from layouts import NONE, PHONEME_MARK, Spoken, bistream, can_bistream, joined, one_shot, pronunciation
from packing import batches, packed, prefetched
from text_tokenizer import spoken_texts, train_tokenizer, write_texts
from training import Learner

from light_tts.models.cosyvoice2.config import load_config
from light_tts.models.cosyvoice2.frontend.tokenizer import SPECIAL_TOKENS, TextTokenizer
from light_tts.models.cosyvoice2.llm import Qwen2Config, SpeechIds, SpeechLM
from light_tts.server.tts_llm.sequence import Bistream, OneShot

IDS = SpeechIds(text_vocab=1024, speech_tokens=729, speech_vocab=732)
MIX = (5, 15)
PHONEMES = 178


def spoken(texts: int, tokens: int, seed: int = 0) -> Spoken:
    draw = np.random.default_rng(seed)
    return Spoken(
        draw.integers(0, END_OF_TEXT, texts),
        draw.integers(0, 729, tokens),
        draw.integers(0, PHONEMES, tokens),
    )


def small_model() -> TrainedLM:
    torch.manual_seed(0)
    backbone = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=1024,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )
    golden = Path(__file__).parent / "golden" / "cosyvoice2" / "checkpoint"
    return TrainedLM(SpeechLM(backbone, load_config(golden).llm), PHONEMES)


def targets_after(layout) -> list[int]:
    return [int(token) for token in layout.speech if token != NONE]


def test_one_shot_is_what_the_server_feeds():
    prompt, target = spoken(7, 40, 1), spoken(9, 45, 2)
    server = OneShot(
        "job", 0, 0, IDS, 4096, list(prompt.text), list(target.text), list(prompt.speech), list(target.speech)
    )
    layout = one_shot(joined([prompt, target]), IDS)
    assert layout.inputs.tolist() == server.inputs
    assert targets_after(layout) == [*prompt.speech, *target.speech, IDS.eos]
    first = 1 + len(prompt.text) + len(target.text)
    assert layout.inputs[first] == IDS.task and layout.speech[first] == prompt.speech[0]
    assert layout.phoneme[first] == prompt.phoneme[0] and layout.phoneme[-1] == NONE


@pytest.mark.parametrize(
    "texts, tokens, prompt",
    [(23, 110, 0), (20, 100, 0), (4, 30, 0), (5, 15, 0), (23, 110, 40), (31, 150, 45)],
)
def test_bistream_is_what_the_server_feeds(texts, tokens, prompt):
    whole = spoken(texts, tokens)
    assert can_bistream(whole, MIX)
    layout = bistream(whole, IDS, MIX)
    said = targets_after(layout)
    assert said[-1] == IDS.eos
    assert [token for token in said if token < IDS.eos] == whole.speech.tolist()
    fills = texts // MIX[0]
    assert said.count(IDS.fill) == fills
    assert all(said[16 * n + 15] == IDS.fill for n in range(fills))
    assert IDS.speech(IDS.fill) not in layout.inputs

    prompt_texts = 8 if prompt else 0
    in_prompt = prompt + prompt // MIX[1] - (prompt % MIX[1] == 0 and prompt > 0)  # and the fills among them
    server = Bistream(
        "job", 0, 0, IDS, 4096, whole.text[:prompt_texts].tolist(), whole.speech[:prompt].tolist(),
        said[in_prompt:-1], MIX,
    )  # fmt: skip
    server.append_text(whole.text[prompt_texts:].tolist())
    server.finish_text()
    assert server.inputs == layout.inputs.tolist()
    assert not server.finished
    server.accept(IDS.eos)
    assert server.finished


def test_pronunciation_says_phonemes_and_the_end():
    layout = pronunciation(np.array([5, 6]), np.array([40, 41, 42]), IDS)
    assert layout.phoneme.tolist() == [NONE, NONE, NONE, 40, 41, 42, PHONEME_MARK]
    assert layout.inputs[3] == IDS.task + 1 + PHONEME_MARK and set(layout.speech) == {NONE}


def test_packed_rows_hold_every_sequence_once():
    layouts = [one_shot(spoken(n, 5 * n, n), IDS) for n in range(20, 120, 7)]
    batch, left = packed(layouts, 4)
    found = []
    for inputs, positions, number, speech, _ in batch.transpose(1, 0, 2):
        for one in sorted(set(number.tolist()) - {-1}):
            where = number == one
            assert positions[where].tolist() == list(range(where.sum()))
            assert speech[where][-1] == IDS.eos
            found.append(inputs[where].tolist())
        assert (speech[number == -1] == NONE).all()
    expected = [layout.inputs.tolist() for layout in layouts]
    assert sorted(found + [layout.inputs.tolist() for layout in left]) == sorted(expected)


def test_batches_are_full_and_mixed_in_the_given_shares():
    voices = [[spoken(n, 5 * n, n) for n in range(10, 60, 5)] for _ in range(3)]
    told = [pronunciation(np.arange(20), np.arange(1, 60), IDS)]
    draw = training_layouts(voices, told, IDS, MIX, np.random.default_rng(0))
    take = prefetched(batches(draw, 8))
    many = np.stack([take() for _ in range(12)], 1)
    used = many[2] >= 0
    assert used.mean() > 0.9
    assert (many[0] == IDS.task + 1 + PHONEME_MARK).sum() * 80 / used.sum() == pytest.approx(0.3, abs=0.05)
    ends, fills = (many[3] == IDS.eos).sum(), (many[3] == IDS.fill).sum()
    assert ends > 0 and fills > 0


def test_sequences_in_a_row_do_not_see_each_other():
    model = small_model().eval()
    layouts = [one_shot(spoken(8, 40, seed), IDS) for seed in range(3)]
    together = torch.from_numpy(packed(layouts, 1)[0][:, :, :192])
    batch = packed(layouts[:1], 1)[0][:, :, :64]
    alone = torch.from_numpy(batch)
    size = len(layouts[0])
    with torch.no_grad():
        torch.testing.assert_close(model(together)[0][:size], model(alone)[0][:size], atol=1e-5, rtol=1e-4)
        later = alone.clone()
        later[0, 0, size - 1] += 1
        changed = (model(later)[0] != model(alone)[0])[:size].any(-1)
    assert not changed[:-1].any() and changed[-1]


def test_attention_gives_each_query_head_its_key():
    """Against plain attention of one sequence, heads written out."""
    torch.manual_seed(0)
    q, k, v = torch.randn(6, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    out = Packed(torch.zeros(1, 6, dtype=torch.int32), torch.float32)(0, q, k, v)
    for head in range(4):
        scores = q[:, head] @ k[:, head // 2].T / 8**0.5
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(out[:, head], scores.softmax(-1) @ v[:, head // 2])


def test_loss_falls_and_dropout_ends_with_training():
    model = small_model()
    learner = Learner(model, 3e-3)
    learner.set_rate(1.0)
    layouts = [one_shot(spoken(8, 40), IDS), pronunciation(np.arange(9), np.arange(1, 30), IDS)]
    batch = torch.from_numpy(packed(layouts, 1)[0][:, :, :128])
    losses = [training_step(model, learner, batch) for _ in range(25)]
    for kind in ("speech", "phoneme"):
        assert losses[-1][kind] < 0.8 * losses[0][kind]
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(batch)[0], model(batch)[0])
    found = measured(model, layouts, torch.device("cpu"), rows=1)
    assert found["speech_nats"] < 5 and 0 <= found["end_accuracy"] <= 1 and "fill_accuracy" not in found


def test_noise_changes_speech_alone():
    inputs = torch.arange(IDS.task + 1 + PHONEMES).repeat(20)
    changed = with_noise(inputs, IDS) != inputs
    is_speech = (inputs >= IDS.text_vocab) & (inputs < IDS.text_vocab + IDS.speech_tokens)
    assert not changed[~is_speech].any()
    assert changed[is_speech].float().mean() == pytest.approx(training_of_lm.NOISE, abs=0.01)


def test_phonemes_are_heard_in_the_middle_of_tokens():
    assert heard(np.array([0, 7, 8, 0]), np.array([0.05, 0.04, 0.1, 0.02]), 5).tolist() == [0, 7, 8, 8, 8]


def test_exported_model_is_the_trained_one(tmp_path):
    config, backbone, _ = write_config(tmp_path)
    model = TrainedLM(SpeechLM(backbone, config.llm), PHONEMES)
    learner = Learner(model, 1e-3)
    torch.save({"model": learner.state()}, training_file(tmp_path, training_of_lm.NAME))
    path = export(tmp_path)
    state = torch.load(path, weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16}
    head, table = (state[f"llm.model.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
    assert head.data_ptr() == table.data_ptr()
    assert path.stat().st_size < 15e6

    folder = checkpoint_folder(tmp_path)
    loaded = SpeechLM.from_checkpoint(folder, path, config, torch.device("cpu"))
    assert (loaded.ids.eos, loaded.ids.fill, loaded.ids.text_vocab) == (729, 731, 1024)
    layout = one_shot(spoken(8, 40), IDS)
    batch = torch.from_numpy(packed([layout], 1)[0][:, :, : len(layout)])
    with torch.no_grad():
        expected = model.eval()(batch)[0]
        hidden = loaded(batch[0, 0], batch[1, 0], Packed(batch[2], torch.float32))
    torch.testing.assert_close(loaded.logits(hidden), expected, atol=5e-3, rtol=5e-3)


def test_configuration_has_the_sampling_that_suits_the_model(tmp_path):
    sampling = write_config(tmp_path)[0].llm.sampling
    assert (sampling.top_p, sampling.top_k, sampling.tau_r) == (MINI.top_p, MINI.top_k, MINI.tau_r)
    assert sampling.win_size == 10


def test_tokenizer_fits_the_model(tmp_path):
    write_config(tmp_path)
    folder = checkpoint_folder(tmp_path)
    words = [
        a + b + c + d for a in "bdklmnprst" for b in "aeiou" for c in "bdklmnprst" for d in ("ing", "er")
    ]
    train_tokenizer([" ".join(words[n::7]) for n in range(7)] * 2, folder)
    tokenizer = TextTokenizer(folder)
    assert len(tokenizer) == Qwen2Config.load(folder).vocab_size == 1024
    assert tokenizer.eos_token_id == END_OF_TEXT
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == list(range(END_OF_TEXT + 1, 1024))
    backbone = json.loads((folder / "CosyVoice-BlankEN" / "config.json").read_text())
    assert backbone["eos_token_id"] == backbone["bos_token_id"] == END_OF_TEXT
    known = tokenizer.encode(words[0] + " " + words[1])
    assert len(known) < len(words[0])
    for text in ("Zebra 7!", "你好 \u0001 é", "<|endofprompt|>[laughter] so"):
        ids = tokenizer.encode(text)
        assert ids and max(ids) < 1024
        assert tokenizer._encoding.decode(ids, skip_special_tokens=False) == text


def test_texts_are_those_of_the_server(tmp_path):
    pytest.importorskip("wetext")
    for name, texts in (("sentences", ["It is 8:10 now.", "It is late."]), ("utterances", ["We have 3."])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_texts(tmp_path)
    assert spoken_texts(tmp_path) == {
        "It is 8:10 now.": "It is eight ten now.",
        "We have 3.": "We have three.",
    }
