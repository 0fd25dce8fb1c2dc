"""The parts of scripts/train_mini that need no download: what is spoken, by whom, and what is held out."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts" / "train_mini"))

from onnx_torch import OnnxModule
from packages import FetchError, Package, unpacked
from sentences import made, split_of, tidy
from speakers import HELD_OUT, SHARES, Speaker, speakers, style
from utterances import held_out_utterances, training_utterances

NAMES = [f"{kind}_{name}" for kind in ("af", "am", "bf", "jf", "zm") for name in "abcdefgh"] + [*HELD_OUT]


def sentences(count: int) -> list[dict]:
    sources = ("examples", "definitions", "made")
    texts = [f"This is sentence number {n}." for n in range(count)]
    return [
        {"text": text, "phonemes": text.lower(), "source": sources[n % 3], "split": split_of(text)}
        for n, text in enumerate(texts)
    ]


def test_held_out_voices_are_in_no_speaker_that_is_trained_on():
    found = speakers(NAMES)
    assert found == speakers(NAMES)
    assert len({speaker.name for speaker in found}) == len(found)
    for speaker in found:
        assert sum(speaker.voices.values()) == pytest.approx(1.0)
        assert (speaker.split == "test") == any(voice in HELD_OUT for voice in speaker.voices)


def test_a_style_is_the_blend_of_its_voices(tmp_path):
    for name, value in (("a", 1.0), ("b", 3.0)):
        np.full((510, 256), value, np.float32).tofile(tmp_path / f"{name}.bin")
    speaker = Speaker("blend", "blend", {"a": 0.25, "b": 0.75})
    np.testing.assert_allclose(style(tmp_path, speaker), np.full((510, 256), 2.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the dog barked at the moon", "The dog barked at the moon."),
        ("Who is it at the door?", "Who is it at the door?"),
        ("too short", None),
        ("caf\u00e9 is not written in letters we have", None),
        ("a bastard of a man he was", None),
        ("", None),
    ],
)
def test_only_what_can_be_spoken_becomes_a_sentence(text, expected):
    assert tidy(text) == expected


def test_made_sentences_are_fit_to_be_spoken():
    assert all(tidy(text) == text for text in made(300))


def test_utterances_hold_out_what_is_held_out_and_keep_the_shares():
    found, texts = speakers(NAMES), sentences(3000)
    split = {speaker.name: speaker.split for speaker in found}
    kinds = {speaker.name: speaker.kind for speaker in found}
    spoken = list(training_utterances(texts, found, hours=1.0))
    assert spoken == list(training_utterances(texts, found, hours=1.0))
    assert 3600 <= sum(utterance.seconds for utterance in spoken) < 3620
    held_out = {sentence["text"] for sentence in texts if sentence["split"] == "test"}
    for utterance in spoken:
        assert split[utterance.speaker] == "train"
        assert not any(text in utterance.text for text in held_out)
    for kind, count in Counter(kinds[utterance.speaker] for utterance in spoken).items():
        assert abs(count / len(spoken) - SHARES[kind]) < 0.08
    for utterance in held_out_utterances(texts, found):
        assert split[utterance.speaker] == "test" and utterance.text in held_out


def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    def fetch(self: Package, folder: Path) -> Path:
        (folder / "x.whl").write_bytes(b"something else")
        return folder / "x.whl"

    monkeypatch.setattr(Package, "fetch", fetch)
    with pytest.raises(FetchError, match="its sha256 is"):
        unpacked(Package("x", "1", "pypi", "0" * 64, "nothing"), tmp_path)
    assert not any((tmp_path / "packages").iterdir())


def test_a_quantised_graph_gives_what_onnxruntime_gives(tmp_path):
    """A product and a convolution in int8; onnxruntime rounds the activations, too."""
    random = np.random.default_rng(0)
    weights = {
        "w": random.integers(0, 255, (16, 8)).astype(np.uint8),
        "w_zero": np.array(120, np.uint8),
        "w_scale": np.array(0.01, np.float32),
        "shape": np.array([1, 8, -1], np.int64),
        "k": random.integers(0, 255, (4, 8, 3)).astype(np.uint8),
    }
    node = helper.make_node
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "q_scale", "q_zero"]),
        node("MatMulInteger", ["q", "w", "q_zero", "w_zero"], ["product"]),
        node("Cast", ["product"], ["product_float"], to=TensorProto.FLOAT),
        node("Mul", ["q_scale", "w_scale"], ["scale"]),
        node("Mul", ["product_float", "scale"], ["y"]),
        node("Transpose", ["y"], ["y_t"], perm=[1, 0]),
        node("Reshape", ["y_t", "shape"], ["image"]),
        node("DynamicQuantizeLinear", ["image"], ["r", "r_scale", "r_zero"]),
        node("ConvInteger", ["r", "k", "r_zero", "w_zero"], ["sum"], pads=[1, 1], strides=[1], dilations=[1]),
        node("Cast", ["sum"], ["sum_float"], to=TensorProto.FLOAT),
        node("Mul", ["r_scale", "w_scale"], ["scale_2"]),
        node("Mul", ["sum_float", "scale_2"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "quantised",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 16])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "quantised.onnx"
    onnx.save(model, path)
    x = random.standard_normal((5, 16)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})
    (found,) = OnnxModule(path, torch.device("cpu"))(x=torch.from_numpy(x))
    assert np.linalg.norm(found.numpy() - expected) < 0.02 * np.linalg.norm(expected)
