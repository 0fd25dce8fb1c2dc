"""The text tokenizer and the language model of training/, on made data."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from light_tts.common.sampling_rule import SamplingRule
from light_tts.engine.llm.bistream import Bistream
from light_tts.engine.llm.one_shot import OneShot
from light_tts.engine.llm.sequence import PartRequest
from light_tts.models.checkpoint.cosyvoice2_config import COSYVOICE2_IDS, load_config
from light_tts.models.checkpoint.special_tokens import COSYVOICE2_TOKENS
from light_tts.models.frontend.tokenizer import TextTokenizer
from light_tts.models.llm.speech_lm import Qwen2Config, SpeechIds, SpeechLM
from training.checkpoint import (
    ALIGNMENT_HEADS,
    END_OF_TEXT,
    MINI,
    SPECIAL_IDS,
    checkpoint_folder,
    training_file,
    write_config,
)
from training.corpus.corpus import LATE
from training.corpus.sentences import normalizer
from training.lm import language_model
from training.lm.attention import Packed, Watched
from training.lm.data import phonemes_of_tokens, training_layouts
from training.lm.free_generation import LIMIT, Cache, speak
from training.lm.language_model import SlowAverage, TrainedLM, export, measured, training_step, with_noise
from training.lm.layouts import (
    NONE,
    PHONEME_MARK,
    Spoken,
    bistream,
    can_bistream,
    joined,
    one_shot,
    pronunciation,
)
from training.lm.packing import batches, packed, prefetched
from training.lm.recognised import Reference, collapsed, faults, likeliest
from training.lm.text_tokenizer import add_characters, add_rows, train_tokenizer
from training.lm.weights import keep_better, weights_to_use
from training.lm.words import ids_of_words, spoken_words, words_at
from training.loop import Learner, averaged_weights, train

IDS = SpeechIds(1024, 729, COSYVOICE2_IDS)
MIX = (5, 15)
PHONEMES = 178


def spoken(texts: int, tokens: int, seed: int = 0) -> Spoken:
    draw = np.random.default_rng(seed)
    first = np.arange(tokens) * texts // tokens  # one text id after the other
    return Spoken(
        draw.integers(0, END_OF_TEXT, texts),
        draw.integers(0, 729, tokens),
        draw.integers(0, PHONEMES, tokens),
        np.stack([first, first + 1], 1),
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
    golden = Path(__file__).parents[1] / "golden" / "cosyvoice2" / "checkpoint"
    return TrainedLM(SpeechLM(backbone, load_config(golden).llm), PHONEMES)


def targets_after(layout) -> list[int]:
    return [int(token) for token in layout.speech if token != NONE]


def test_one_shot_is_what_the_server_feeds():
    prompt, target = spoken(7, 40, 1), spoken(9, 45, 2)
    part = PartRequest("job", 0, 0, IDS, 4096, list(prompt.text), list(prompt.speech), list(target.speech))
    server = OneShot(part, list(target.text))
    layout = one_shot(joined([prompt, target]), IDS)
    assert layout.inputs.tolist() == server.inputs
    assert targets_after(layout) == [*prompt.speech, *target.speech, IDS.eos]
    first = 1 + len(prompt.text) + len(target.text)
    assert layout.inputs[first] == IDS.task and layout.speech[first] == prompt.speech[0]
    assert layout.phoneme[first] == prompt.phoneme[0] and layout.phoneme[-1] == NONE


@pytest.mark.parametrize(
    "texts, tokens, prompt",
    [
        (23, 110, 0),
        (20, 100, 0),
        (4, 30, 0),
        (5, 15, 0),
        (23, 110, 40),
        (31, 150, 45),
        (13, 110, 50),  # all blocks are in the prompt
        (11, 60, 31),
    ],
)
def test_bistream_is_what_the_server_feeds(texts, tokens, prompt):
    whole = spoken(texts, tokens)
    assert can_bistream(whole, MIX)
    layout = bistream(whole, IDS, MIX, prompt)
    said = targets_after(layout)
    assert said[-1] == IDS.eos
    assert [token for token in said if token < IDS.eos] == whole.speech.tolist()
    fills = texts // MIX[0]
    assert said.count(IDS.fill) == fills
    assert all(said[16 * n + 15] == IDS.fill for n in range(fills))
    assert IDS.speech(IDS.fill) not in layout.inputs

    prompt_texts = 8 if prompt else 0
    in_prompt = prompt + min(fills, max(0, prompt - 1) // MIX[1])  # and the fills among them
    prompt_text, prompt_speech = whole.text[:prompt_texts].tolist(), whole.speech[:prompt].tolist()
    part = PartRequest("job", 0, 0, IDS, 4096, prompt_text, prompt_speech, said[in_prompt:-1])
    server = Bistream(part, MIX)
    server.append_text(whole.text[prompt_texts:].tolist())
    server.finish_text()
    assert server.inputs == layout.inputs.tolist()
    assert not server.finished
    server.accept(IDS.eos)
    assert server.finished


def test_pronunciation_says_phonemes_and_the_end():
    words = np.array([[0, 1], [0, 2], [1, 2]])
    layout = pronunciation(np.array([5, 6]), np.array([40, 41, 42]), words, IDS)
    assert layout.words.tolist() == [[0, 0], [0, 0], [0, 0], [1, 2], [1, 3], [2, 3], [0, 0]]
    assert layout.phoneme.tolist() == [NONE, NONE, NONE, 40, 41, 42, PHONEME_MARK]
    assert layout.inputs[3] == IDS.task + 1 + PHONEME_MARK and set(layout.speech) == {NONE}


def test_packed_rows_hold_every_sequence_once():
    layouts = [one_shot(spoken(n, 5 * n, n), IDS) for n in range(20, 120, 7)]
    batch, left = packed(layouts, 4)
    found = []
    for inputs, positions, number, speech, _, begin, end in batch.transpose(1, 0, 2):
        for one in sorted(set(number.tolist()) - {-1}):
            where = number == one
            known = where & (end > begin)
            assert known.sum() == (speech[where] != NONE).sum() - 1
            assert (number[begin[known]] == one).all() and (inputs[begin[known]] < IDS.text_vocab).all()
            assert positions[where].tolist() == list(range(where.sum()))
            assert speech[where][-1] == IDS.eos
            found.append(inputs[where].tolist())
        assert (speech[number == -1] == NONE).all()
    expected = [layout.inputs.tolist() for layout in layouts]
    assert sorted(found + [layout.inputs.tolist() for layout in left]) == sorted(expected)


def test_batches_are_full_and_mixed_in_the_given_shares():
    voices = [[spoken(n, 5 * n, n) for n in range(10, 60, 5)] for _ in range(3)]
    told = [pronunciation(np.arange(20), np.arange(1, 60), np.zeros((59, 2), int), IDS)]
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
    told = pronunciation(np.arange(9), np.arange(1, 30), np.zeros((29, 2), int), IDS)
    layouts = [one_shot(spoken(8, 40), IDS), told]
    batch = torch.from_numpy(packed(layouts, 1)[0][:, :, :128])
    losses = [training_step(model, learner, batch) for _ in range(25)]
    for kind in ("speech", "phoneme", "alignment"):
        assert losses[-1][kind] < 0.8 * losses[0][kind]
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(batch)[0], model(batch)[0])
    found = measured(model, layouts, torch.device("cpu"), rows=1)
    assert found["speech_nats"] < 5 and 0 <= found["end_accuracy"] <= 1 and "fill_accuracy" not in found


def test_noise_changes_speech_alone():
    inputs = torch.arange(IDS.task + 1 + PHONEMES).repeat(400, 1)
    changed = with_noise(inputs, IDS) != inputs
    is_speech = (inputs >= IDS.text_vocab) & (inputs < IDS.text_vocab + IDS.speech_tokens)
    assert not changed[~is_speech].any()
    assert changed[is_speech].float().mean() == pytest.approx(language_model.NOISE, abs=0.01)


def test_phonemes_are_heard_in_the_middle_of_tokens_a_little_late():
    durations = np.array([LATE + 0.05, 0.04, 0.1, 0.02])
    assert phonemes_of_tokens(np.array([0, 7, 8, 0]), durations, 5).tolist() == [0, 7, 8, 8, 8]


def test_words_of_a_text_are_those_of_its_phonemes():
    text, offsets = "It's late, Bob.", [(0, 2), (2, 4), (4, 9), (9, 10), (10, 12), (12, 14), (14, 15)]
    of_words = ids_of_words(text, offsets)  # a blank goes with what follows it
    assert of_words.tolist() == [0, 2, 4, 7]
    words = spoken_words("ab c, d", of_words)
    assert words.tolist() == [[0, 2], [0, 2], [0, 4], [2, 4], [2, 4], [2, 7], [4, 7]]
    assert spoken_words("ab c", of_words) is None


def test_each_speech_token_knows_the_words_around_it():
    words, seconds = np.array([[0, 1], [1, 2], [2, 3]]), np.array([LATE + 0.09, 0.1, 0.1])
    # token 1 is from 0.04 to 0.08 s, and 0.09 s is where the second word begins
    assert words_at(words, seconds, 7).tolist() == [[0, 1], [0, 2], [0, 2], [1, 2], [1, 3], [1, 3], [2, 3]]


@pytest.mark.parametrize("texts, tokens", [(23, 110), (20, 100), (4, 30), (5, 15)])
def test_layouts_point_to_the_text_that_is_spoken(texts, tokens):
    whole = joined([spoken(texts, tokens, 1), spoken(3, 20, 2)])
    for layout in (one_shot(whole, IDS), bistream(whole, IDS, MIX)):
        said = layout.speech[(layout.speech != NONE) & (layout.speech < IDS.eos)]
        where = layout.words[(layout.speech != NONE) & (layout.speech < IDS.eos)]
        assert said.tolist() == whole.speech.tolist()
        assert layout.inputs[where[:, 0]].tolist() == whole.text[whole.words[:, 0]].tolist()
        assert layout.inputs[where[:, 1] - 1].tolist() == whole.text[whole.words[:, 1] - 1].tolist()
        rest = (layout.speech == NONE) | (layout.speech >= IDS.eos)
        assert (layout.words[rest, 0] == layout.words[rest, 1]).all()


def test_attention_is_asked_for_the_text_that_has_arrived():
    """Two sequences in a row; what a head gives to the words that are spoken, written out."""
    torch.manual_seed(0)
    sequence = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]])
    text = torch.tensor([[True, True, False, True, True, False, False, False]])
    begin, end = torch.zeros(2, 1, 8, dtype=torch.int32)
    begin[0, 2], end[0, 2] = 0, 4  # position 3 is later: 0 and 1 count
    begin[0, 3], end[0, 3] = 0, 4  # 2 is no text
    begin[0, 0], end[0, 0] = 1, 2  # nothing has arrived
    begin[0, 5], end[0, 5] = 3, 5  # 3 is of another sequence
    watched = Watched(torch.stack([begin, end]), text)
    q = torch.randn(8, 4, 8, requires_grad=True)
    k = torch.randn(8, 2, 8)
    Packed(sequence, torch.float32, watched, ((1, 3),))(1, q, k, torch.randn(8, 2, 8))
    assert watched.known.nonzero()[:, 1].tolist() == [2, 3, 5]
    expected = {}
    for position, first, meant in ((2, 0, [0, 1]), (3, 0, [0, 1, 3]), (5, 4, [4])):
        share = (q[position, 3] @ k[first : position + 1, 1].T / 8**0.5).softmax(-1)
        expected[position] = -share[[place - first for place in meant]].sum().log()
        torch.testing.assert_close(watched.nats[0, 0, position], expected[position])
    torch.testing.assert_close(watched.loss, sum(expected.values()) / 3)
    watched.loss.backward()
    assert q.grad.isfinite().all() and q.grad[2, 3].any() and not q.grad[0].any()


def test_a_head_learns_to_look_at_what_is_spoken():
    model = small_model()
    model.heads = ((1, 2),)
    learner, slow = Learner(model, 3e-3), SlowAverage(model)
    learner.set_rate(1.0)
    layouts = [one_shot(spoken(8, 40), IDS), bistream(spoken(12, 60, 1), IDS, MIX)]
    batch = torch.from_numpy(packed(layouts, 1)[0][:, :, :192])
    before = slow.weights()["phoneme_decoder.weight"].clone()
    first, *_, last = [training_step(model, learner, batch, slow) for _ in range(25)]
    assert last["alignment"] < 0.8 * first["alignment"]
    moved = (slow.weights()["phoneme_decoder.weight"] - before).norm()
    assert 0 < moved < 0.02 * (model.phoneme_decoder.weight - before).norm()
    found = measured(model.eval(), layouts, torch.device("cpu"), rows=1)
    assert found["alignment_nats"] < 2 and 0 < found["alignment_accuracy"] <= 1


def test_cached_generation_draws_from_what_the_training_computes():
    """Both ways of the server, several requests of different lengths in one batch."""
    model = small_model().eval()
    lm, sampling = model.lm, SamplingRule(top_p=0.9, top_k=25, win_size=10, tau_r=0.1)
    prompt, text = spoken(7, 20, 1), spoken(12, 1, 2).text.tolist()
    parts = [
        OneShot(PartRequest("a", 0, 1, lm.ids, LIMIT, max_outputs=12), text[:3]),
        OneShot(PartRequest("b", 0, 2, lm.ids, LIMIT, [1, 2], prompt.speech.tolist(), max_outputs=20), text),
        Bistream(PartRequest("c", 0, 3, lm.ids, LIMIT, prompt.text.tolist(), prompt.speech.tolist()), MIX),
    ]
    parts[2].max_outputs = 40
    parts[2].append_text(text)
    parts[2].finish_text()
    seen = []
    hidden = lm.hidden
    lm.hidden = lambda x, positions, attention: seen.append(hidden(x, positions, attention)) or seen[-1]
    speak(lm, parts, sampling, torch.device("cpu"))
    lm.hidden = hidden
    assert all(part.finished and part.error is None for part in parts)
    assert all(2 < len(part.outputs) <= part.max_outputs for part in parts)
    longest = max(parts, key=lambda part: len(part.outputs))
    tokens = torch.tensor(longest.inputs)
    whole = Packed(torch.zeros(1, len(tokens), dtype=torch.int32), torch.float32)
    with torch.no_grad():
        x = torch.cat(lm.tables)[tokens]
        expected = hidden(x, torch.arange(len(tokens)), whole)[-1]
    torch.testing.assert_close(seen[-1][-1], expected, atol=1e-4, rtol=1e-4)


def test_a_cache_never_shows_what_fills_up_a_step():
    backbone = small_model().lm.backbone
    cache = Cache(backbone, 2, torch.device("cpu"))
    rows, positions = torch.tensor([0, 1]), torch.tensor([[0, 1], [0, LIMIT]])
    q, k, v = torch.randn(4, 4, 16), torch.randn(4, 2, 16), torch.randn(4, 2, 16)
    cache.begin(rows, positions, 2)
    torch.testing.assert_close(cache(0, q, k, v)[2], v[2].repeat_interleave(2, 0))
    cache.begin(rows[1:], torch.tensor([[1]]), 2)
    out = cache(0, q[:1], k[:1], v[:1])
    alone = Packed(torch.zeros(1, 2, dtype=torch.int32), torch.float32)
    expected = alone(0, torch.stack([q[2], q[0]]), torch.stack([k[2], k[0]]), torch.stack([v[2], v[0]]))
    torch.testing.assert_close(out[0], expected[1])


def test_phonemes_of_a_text_are_compared_as_they_are_heard():
    ids = {sound: number for number, sound in enumerate(" abcd,ˈ")}
    reference = Reference.of("ˈab, bcd aa", ids)  # b b and a a cannot be told from one
    assert (reference.phonemes, reference.word) == ([1, 2, 3, 4, 1], [0, 0, 1, 1, 2])
    same = faults(reference, [1, 2, 3, 4, 1])
    assert (same.errors, same.missing, same.extra, same.phonemes, same.words) == (0, 0, 0, 5, 3)
    without = faults(reference, [1, 2, 1])
    assert (without.errors, without.missing, without.extra) == (2, 1, 0)
    twice = faults(reference, [1, 2, 3, 4, 2, 3, 4, 1])
    assert (twice.errors, twice.missing, twice.extra) == (3, 0, 1)
    assert faults(reference, []).errors == 5


def test_phonemes_are_heard_where_they_are_clearly_likelier():
    likely = torch.full((1, 6, 4), -5.0)
    for frame, (label, value) in enumerate([(1, 0.0), (1, 0.0), (2, -4.5), (1, 0.0), (3, 0.0), (3, 0.0)]):
        likely[0, frame, label] = value
    assert likeliest(likely, 2.0)[0].tolist() == [1, 1, 1, 1, 3, 3]
    assert likeliest(likely, 0.0)[0].tolist() == [1, 1, 2, 1, 3, 3]
    assert collapsed(np.array([0, 1, 1, 0, 0, 1, 3, 3, 0])) == [1, 1, 3]


def test_the_weights_that_spoke_best_are_exported(tmp_path):
    config, backbone, _ = write_config(tmp_path)
    model = TrainedLM(SpeechLM(backbone, config.llm), PHONEMES)
    latest = training_file(tmp_path, language_model.NAME)
    torch.save({"model": Learner(model, 1e-3).state(), "steps": 7000}, latest)
    best = training_file(tmp_path, language_model.BEST)
    spoken_best = {name: value + 1 for name, value in model.state_dict().items()}
    assert keep_better(best, spoken_best, 0.1, 2000)
    assert weights_to_use(tmp_path) == latest  # which nobody has heard
    assert not keep_better(best, model.state_dict(), 0.2, 7000)
    assert weights_to_use(tmp_path) == best
    state = torch.load(export(tmp_path), weights_only=True)
    name = "llm_decoder.bias"
    assert torch.equal(state[name], spoken_best[f"lm.{name}"].half())
    assert keep_better(best, model.state_dict(), 0.05, 7000)
    assert torch.equal(averaged_weights(best)[f"lm.{name}"], model.state_dict()[f"lm.{name}"])


def test_the_configuration_says_which_heads_are_aligned(tmp_path):
    config, _, _ = write_config(tmp_path)  # which reads it, too
    assert yaml.safe_load(config.path.read_text().splitlines()[-1]) == {
        "alignment_heads": [list(head) for head in ALIGNMENT_HEADS]
    }


def test_training_is_looked_at_on_the_way(tmp_path, capsys):
    model = torch.nn.Linear(2, 1)
    learner = Learner(model, 1e-3)
    step = lambda x: {"loss": learner.learn(model(x).sum()).detach()}  # noqa: E731
    run = partial(train, "x", tmp_path / "x.pt", {"model": learner}, step, lambda: [torch.ones(1, 2)])
    run(0.02, 0.02, lambda: "the end", lambda: "on the way", 0.005)
    out = capsys.readouterr().out
    assert out.count("on the way") >= 1 and out.count("the end") == 1


def test_exported_model_is_the_trained_one(tmp_path):
    config, backbone, _ = write_config(tmp_path)
    model = TrainedLM(SpeechLM(backbone, config.llm), PHONEMES)
    learner = Learner(model, 1e-3)
    torch.save({"model": learner.state()}, training_file(tmp_path, language_model.NAME))
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
    assert [tokenizer.token_id(token) for token in COSYVOICE2_TOKENS] == list(range(END_OF_TEXT + 1, 1024))
    backbone = json.loads((folder / "CosyVoice-BlankEN" / "config.json").read_text())
    assert backbone["eos_token_id"] == backbone["bos_token_id"] == END_OF_TEXT
    known = tokenizer.encode(words[0] + " " + words[1])
    assert len(known) < len(words[0])
    for text in ("Zebra 7!", "你好 \u0001 é", "<|endofprompt|>[laughter] so"):
        ids = tokenizer.encode(text)
        assert ids and max(ids) < 1024
        assert tokenizer._encoding.decode(ids, skip_special_tokens=False) == text


def test_texts_are_those_of_the_server():
    pytest.importorskip("wetext")
    normalize = normalizer()
    assert normalize("It is 8:10 now. It is late.") == "It is eight ten now. It is late."


def test_characters_get_ids_behind_those_that_there_are(tmp_path):
    """English keeps its ids, and what the language model says to them."""
    texts = ["The cat sat on the mat.", "It is five o'clock."]
    write_config(tmp_path)
    folder = checkpoint_folder(tmp_path)
    train_tokenizer(texts * 3, folder)
    before = [TextTokenizer(folder).encode(text) for text in texts]
    old = len(TextTokenizer(folder))
    mandarin = ["你好，很好。", "我们去公园。"]
    new = add_characters(mandarin, folder)
    assert new and add_characters(mandarin, folder) == 0
    _, backbone, _ = write_config(tmp_path)
    tokenizer = TextTokenizer(folder)
    assert [tokenizer.encode(text) for text in texts] == before
    assert all(len(tokenizer.encode(text)) == len(text) for text in mandarin)
    assert len(tokenizer.encode("猫")) > 1  # which is in no text
    assert len(tokenizer) == backbone.vocab_size == old + new

    torch.manual_seed(0)
    smaller = {"lm.llm.model.model.embed_tokens.weight": torch.randn(old, 4)}
    ((_, table),) = add_rows(smaller, new).items()
    kept = old - SPECIAL_IDS
    assert torch.equal(table[:kept], smaller["lm.llm.model.model.embed_tokens.weight"][:kept])
    assert torch.equal(table[-SPECIAL_IDS:], smaller["lm.llm.model.model.embed_tokens.weight"][-SPECIAL_IDS:])
    assert len(table) == old + new


def test_words_of_a_text_without_blanks():
    offsets = [(0, 1), (1, 2), (2, 3), (3, 4)]  # 今, 天, 好, 。
    assert ids_of_words("今天好。", offsets, "今天 好。").tolist() == [0, 2, 4]
