"""The parts of training/ that need no download: what is spoken, by whom, and what is held out."""

import multiprocessing
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from training.corpus import evaluation_set, mandarin, mandarin_everyday
from training.corpus.everyday import everyday
from training.corpus.generate import devices, reports
from training.corpus.packages import FetchError, Package, unpacked
from training.corpus.sentences import EVERYDAY_WORDS, made, split_of, tidy
from training.corpus.speakers import (
    HELD_OUT,
    HELD_OUT_MANDARIN,
    MANDARIN_SHARES,
    SHARES,
    Speaker,
    speakers,
    style,
)
from training.corpus.utterances import held_out_utterances, interleaved, training_utterances
from training.onnx.graph import Graph
from training.onnx.module import OnnxModule, Operators
from training.onnx.simplify import simplify

NAMES = [f"{kind}_{name}" for kind in ("af", "am", "bf", "jf", "zm") for name in "abcdefgh"] + [*HELD_OUT]
MANDARIN_NAMES = [*HELD_OUT_MANDARIN]  # and those that begin with z


def sentences(count: int) -> list[dict]:
    sources = ("examples", "definitions", "everyday")
    texts = [f"This is sentence number {n}." for n in range(count)]
    return [
        {
            "text": text,
            "spoken": text,
            "phonemes": text.lower(),
            "source": sources[n % 3],
            "split": split_of(text),
        }
        for n, text in enumerate(texts)
    ]


def test_held_out_voices_are_in_no_speaker_that_is_trained_on():
    names = NAMES + MANDARIN_NAMES
    found = speakers(names)
    assert found == speakers(names)
    assert len({speaker.name for speaker in found}) == len(found)
    for speaker in found:
        assert sum(speaker.voices.values()) == pytest.approx(1.0)
        held_out = HELD_OUT if speaker.language == "en" else HELD_OUT_MANDARIN
        assert (speaker.split == "test") == any(voice in held_out for voice in speaker.voices)
        assert (speaker.language == "zh") == (speaker.kind == "mandarin")


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


def test_everyday_talk_is_fit_to_be_spoken_and_has_short_and_long_sentences():
    texts = list(everyday(500))
    assert texts == list(everyday(500)) and len(set(texts)) == 500
    assert all(tidy(text, EVERYDAY_WORDS) == text for text in texts)
    sizes = [len(text.split()) for text in texts]
    assert min(sizes) == 1 and max(sizes) > 20
    for part in ("?", "'", "Hello", ", and", ":"):
        assert any(part in text for text in texts)


def test_another_seed_gives_other_utterances_with_names_of_their_own():
    found, texts = speakers(NAMES), sentences(3000)
    one, other = (list(training_utterances(texts, found, 0.2, seed)) for seed in (0, 7))
    assert not {u.id for u in one} & {u.id for u in other}
    assert len({u.text for u in one} & {u.text for u in other}) < 0.1 * len(one)


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


def mandarin_sentences(count: int) -> list[dict]:
    sources = ("examples", "definitions", "everyday")
    texts = ["".join(chr(0x4E00 + int(digit)) for digit in str(n)) + "。" for n in range(count)]
    return [
        {
            "text": text,
            "spoken": text,
            "phonemes": "ma→ " * 3 + "ma↘.",
            "words": f"{text[0]} {text[1:]}",
            "source": sources[n % 3],
            "split": split_of(text),
        }
        for n, text in enumerate(texts)
    ]


def test_mandarin_utterances_have_no_blanks_and_speakers_of_their_own():
    found, texts = speakers(NAMES + MANDARIN_NAMES), mandarin_sentences(900)
    kinds = {speaker.name: speaker.kind for speaker in found}
    spoken = list(training_utterances(texts, found, 0.2, shares=MANDARIN_SHARES))
    own = [voice for voice in found if voice.language == "zh"]
    held_out = list(held_out_utterances(texts, own))
    assert held_out and all(kinds[utterance.speaker] == "mandarin" for utterance in held_out)
    assert not {u.spoken for u in held_out} & {u.spoken for u in spoken}
    for utterance in (*spoken, *held_out):
        assert utterance.id.startswith("z") and " " not in utterance.spoken
        assert utterance.words.replace(" ", "") == utterance.spoken
    shares = Counter(kinds[utterance.speaker] for utterance in spoken)
    assert abs(shares["mandarin"] / len(spoken) - MANDARIN_SHARES["mandarin"]) < 0.1


def test_languages_are_mixed_evenly_and_one_alone_stays_as_it_is():
    found = speakers(NAMES + MANDARIN_NAMES)
    english = list(training_utterances(sentences(3000), found, 0.3))
    without = [speaker for speaker in found if speaker.language == "en"]
    assert english == list(training_utterances(sentences(3000), without, 0.3))
    assert interleaved([english]) == english
    mixed = interleaved([english, english[:50]])
    assert sorted(u.id for u in mixed) == sorted(u.id for u in english + english[:50])
    assert len({u.id for u in mixed[: len(mixed) // 2]}) < 0.9 * len(mixed) // 2


def test_mandarin_talk_is_fit_to_be_spoken():
    words = mandarin_everyday.WORDS | {kind: ["东西"] for kind in mandarin.KINDS}
    texts = [mandarin.tidy(text) for text in everyday(500, 0, mandarin_everyday.PATTERNS, words)]
    texts = [text for text in texts if text is not None]
    assert len(texts) > 450
    without_numbers = [text for text in texts if not any(sign.isdigit() for sign in text)]
    assert all(mandarin.SPEAKABLE.fullmatch(text) for text in without_numbers)


def test_mandarin_that_should_not_be_said_is_left_out():
    assert mandarin.tidy("今天很好") == "今天很好。"
    assert mandarin.tidy("他是混蛋。") is None
    assert mandarin.is_common("好") and not mandarin.is_common("馬") and not mandarin.is_common("a")


def test_processes_are_dealt_to_all_gpus():
    assert devices(5, 2) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert devices(2, 0) == ["cpu", "cpu"]


def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    def fetch(self: Package, folder: Path) -> Path:
        (folder / "x.whl").write_bytes(b"something else")
        return folder / "x.whl"

    monkeypatch.setattr(Package, "fetch", fetch)
    with pytest.raises(FetchError, match="its sha256 is"):
        unpacked(Package("x", "1", "pypi", "0" * 64, "nothing"), tmp_path)
    assert not any((tmp_path / "packages").iterdir())


node = helper.make_node
FLOAT = TensorProto.FLOAT


def saved(
    tmp_path: Path, nodes: list, weights: dict, shape: list, outputs: tuple[str, ...] = ("out",)
) -> Path:
    """The graph from the input x to the outputs."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    path = tmp_path / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def by_onnxruntime_and_us(path: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first output."""
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]
    return expected, OnnxModule(path, torch.device("cpu"))(x=torch.from_numpy(x))[0].numpy()


def operators(path: Path) -> list[str]:
    """That are left when the graph is simplified."""
    graph = Graph.read(path)
    simplify(graph, Operators(torch.device("cpu")).run)
    return [left.operator for left in graph.nodes]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


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
    path = saved(tmp_path, nodes, weights, [5, 16])
    x = random.standard_normal((5, 16)).astype(np.float32)
    expected, found = by_onnxruntime_and_us(path, x)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    assert operators(path) == ["Linear", "Transpose", "Reshape", "Conv"]


def test_a_quantised_bias_is_not_rounded(tmp_path):
    """By the scale of the weights, which is all that is left of the product's scale."""
    weights = {
        "k": np.full((1, 1, 1), 100, np.uint8),
        "k_zero": np.array(0, np.uint8),
        "k_scale": np.array(0.01, np.float32),
        "bias": np.array([0.0567], np.float32),
        "shape": np.array([1, -1, 1], np.int64),
    }
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "q_scale", "q_zero"]),
        node("ConvInteger", ["q", "k", "q_zero", "k_zero"], ["sum"], pads=[0, 0], strides=[1], dilations=[1]),
        node("Mul", ["q_scale", "k_scale"], ["scale"]),
        node("Div", ["bias", "scale"], ["divided"]),
        node("Floor", ["divided"], ["floor"]),
        node("Cast", ["floor"], ["whole"], to=TensorProto.INT32),
        node("Reshape", ["whole", "shape"], ["column"]),
        node("Add", ["sum", "column"], ["biased"]),
        node("Cast", ["biased"], ["float"], to=FLOAT),
        node("Mul", ["float", "scale"], ["out"]),
    ]
    path = saved(tmp_path, nodes, weights, [1, 1, 7])
    x = normal(1, 1, 7)
    expected, found = by_onnxruntime_and_us(path, x)
    np.testing.assert_allclose(found, x + 0.0567, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert operators(path) == ["Conv"]


def linear(x: str, name: str, out: str) -> list:
    """As it comes out of the int8 product, here of floats."""
    return [
        node("MatMul", [x, f"{name}_w"], [f"{name}_product"]),
        node("Cast", [f"{name}_product"], [f"{name}_float"], to=FLOAT),
        node("Mul", [f"{name}_float", f"{name}_scale"], [f"{name}_scaled"]),
        node("Add", [f"{name}_bias", f"{name}_scaled"], [out]),
    ]


def linear_weights(name: str, inputs: int, outputs: int, seed: int) -> dict:
    return {
        f"{name}_w": normal(inputs, outputs, seed=seed),
        f"{name}_scale": np.abs(normal(outputs, seed=seed + 1)),
        f"{name}_bias": normal(outputs, seed=seed + 2),
    }


def test_a_norm_whose_weight_a_linear_gives_and_a_snake_are_one_node_each(tmp_path):
    """A norm of two samples with weights of their own; the deviation has another reader and stays for it."""
    weights = {
        **linear_weights("style", 7, 6, seed=1),
        "middle": np.array([1], np.int64),
        "last": np.array([2], np.int64),
        "halves": np.array([3, 3], np.int64),
        "one": np.array(1, np.float32),
        "two": np.array(2, np.float32),
        "epsilon": np.array(1e-5, np.float32),
        "a": np.abs(normal(1, 3, 1, seed=4)) + 1,
        "b": normal(1, 3, 1, seed=5),
    }
    nodes = [
        node("ReduceMean", ["x", "middle"], ["style"], keepdims=0),
        *linear("style", "style", "both"),
        node("Unsqueeze", ["both", "last"], ["columns"]),
        node("Split", ["columns", "halves"], ["gamma", "beta"], axis=1),
        node("Add", ["gamma", "one"], ["weight"]),
        node("ReduceMean", ["x", "last"], ["mean"], keepdims=1),
        node("Sub", ["x", "mean"], ["deviation"]),
        node("Mul", ["deviation", "deviation"], ["square"]),
        node("ReduceMean", ["square", "last"], ["variance"], keepdims=1),
        node("Add", ["variance", "epsilon"], ["positive"]),
        node("Sqrt", ["positive"], ["root"]),
        node("Div", ["deviation", "root"], ["normalised"]),
        node("Mul", ["weight", "normalised"], ["scaled"]),
        node("Add", ["scaled", "beta"], ["norm"]),
        node("Mul", ["a", "norm"], ["angle"]),
        node("Sin", ["angle"], ["sine"]),
        node("Pow", ["sine", "two"], ["power"]),
        node("Mul", ["b", "power"], ["part"]),
        node("Add", ["norm", "part"], ["out"]),
    ]
    x = normal(2, 3, 7)
    path = saved(tmp_path, nodes, weights, [2, 3, 7], ("out", "deviation"))
    expected, found = by_onnxruntime_and_us(path, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert operators(path) == [
        *("ReduceMean", "Linear", "Unsqueeze", "Split"),
        *("ReduceMean", "Sub", "InstanceNorm", "Snake"),
    ]


def attention() -> list:
    """As the teacher's exporter took it apart."""

    def size(of: str, axis: str, out: str) -> list:
        return [
            node("Shape", [of], [f"{out}_shape"]),
            node("Gather", [f"{out}_shape", axis], [f"{out}_size"], axis=0),
            node("Unsqueeze", [f"{out}_size", "first"], [out]),
        ]

    def part(name: str, perm: list[int]) -> list:
        return [
            *linear("x", name, name),
            *size(name, "0", f"{name}_0"),
            *size(name, "1", f"{name}_1"),
            node("Concat", [f"{name}_0", f"{name}_1", "heads", "size"], [f"{name}_sizes"], axis=0),
            node("Reshape", [name, f"{name}_sizes"], [f"{name}_4"]),
            node("Transpose", [f"{name}_4"], [f"{name}_t"], perm=perm),
        ]

    ones = helper.make_tensor("value", FLOAT, [1], [1.0])
    return [
        *part("q", [0, 2, 1, 3]),
        *part("k", [0, 2, 3, 1]),
        *part("v", [0, 2, 1, 3]),
        node("Shape", ["q_4"], ["q_shape"]),
        node("Gather", ["q_shape", "perm"], ["t_shape"], axis=0),
        node("Slice", ["t_shape", "from", "end"], ["last"]),
        node("Cast", ["last"], ["width"], to=FLOAT),
        node("Sqrt", ["width"], ["root"]),
        node("Div", ["1.0", "root"], ["inverse"]),
        node("Sqrt", ["inverse"], ["scale"]),
        node("Mul", ["q_t", "scale"], ["queries"]),
        node("Mul", ["k_t", "scale"], ["keys"]),
        node("MatMul", ["queries", "keys"], ["scores"]),
        *size("x", "0", "x_0"),
        *size("x", "1", "x_1"),
        node("Concat", ["x_0", "x_1"], ["mask_shape"], axis=0),
        node("ConstantOfShape", ["mask_shape"], ["shown"], value=ones),
        node("Unsqueeze", ["shown", "middle"], ["shown_4"]),
        node("Concat", ["x_0", "one", "x_1", "x_1"], ["mask_shape_4"], axis=0),
        node("Expand", ["shown_4", "mask_shape_4"], ["shown_to_all"]),
        node("Sub", ["1.0", "shown_to_all"], ["hidden"]),
        node("Cast", ["hidden"], ["is_hidden"], to=TensorProto.BOOL),
        node("Where", ["is_hidden", "lowest", "hidden"], ["mask"]),
        node("Add", ["scores", "mask"], ["masked"]),
        node("Softmax", ["masked"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v_t"], ["context"]),
        node("Transpose", ["context"], ["context_t"], perm=[0, 2, 1, 3]),
        node("Concat", ["x_0", "x_1", "channels"], ["flat"], axis=0),
        node("Reshape", ["context_t", "flat"], ["out"]),
    ]


def test_an_attention_that_was_taken_apart_is_one_node(tmp_path):
    heads, size, channels = 3, 4, 10
    weights = {
        name: weight
        for seed, part in enumerate("qkv")
        for name, weight in linear_weights(part, channels, heads * size, seed=10 * seed).items()
    }
    integers = {
        **{"0": 0, "1": 1, "first": [0], "one": [1], "middle": [1, 2], "from": [-1], "end": [2**62]},
        **{"perm": [0, 2, 1, 3], "heads": [heads], "size": [size], "channels": [heads * size]},
    }
    weights |= {name: np.array(value, np.int64) for name, value in integers.items()}
    weights |= {"1.0": np.array([1], np.float32), "lowest": np.array(-3e38, np.float32)}
    path = saved(tmp_path, attention(), weights, [2, 5, channels])
    expected, found = by_onnxruntime_and_us(path, normal(2, 5, channels))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert operators(path) == ["SelfAttention"]


def test_the_host_does_not_wait_for_the_device(tmp_path):
    """PyTorch's meta device has no data that could be read."""
    weights = {
        "scales": np.array([1, 1, 2], np.float32),
        "sizes": np.full(100, 2, np.int64),
        "window": np.array([0, 1, 1, 0, 1], np.float32),
        "tiny": np.array(0.5, np.float32),
        **{name: np.array(value, np.int64) for name, value in {"0": [0], "1": [1], "last": 2}.items()},
    }
    parts = [f"part {n}" for n in range(100)]
    nodes = [
        node("Resize", ["x", "", "scales"], ["twice"], mode="nearest", nearest_mode="floor"),
        node("Split", ["twice", "sizes"], parts, axis=2),
        node("Shape", [parts[0]], ["shape"]),
        node("Gather", ["shape", "last"], ["steps"], axis=0),
        node("Unsqueeze", ["steps", "0"], ["end"]),
        node("Slice", ["window", "0", "end", "0", "1"], ["begin"]),
        node("Greater", ["begin", "tiny"], ["is_loud"]),
        node("NonZero", ["is_loud"], ["loud"]),
        node("Gather", [parts[0], "loud"], ["out"], axis=2),
    ]
    path = saved(tmp_path, nodes, weights, [1, 3, 100])
    (found,) = OnnxModule(path, torch.device("meta"))(x=torch.ones(1, 3, 100))
    assert found.is_meta and found.shape == (1, 3, 1, 1)


def test_generation_ends_when_its_processes_do_in_whatever_way():
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    done.put((3, 12.5))
    process = context.Process(target=time.sleep, args=(60,))
    process.start()
    came = reports(done, [process])
    assert next(came) == (3, 12.5)
    process.kill()
    assert list(came) == []


def test_voices_that_answers_are_judged_by_are_held_out():
    found = {speaker.name: speaker for speaker in speakers(NAMES)}
    trained = {voice for s in found.values() if s.split == "train" for voice in s.voices}
    assert not trained & {voice for voice, _ in evaluation_set.DISTINCT.values()}
    known = {name: found[name] for name in evaluation_set.PROMPTS}
    recorded = {s.name: text for s, text in evaluation_set.prompts(known)}
    assert set(recorded) == {*evaluation_set.PROMPTS, *evaluation_set.DISTINCT}
    said = evaluation_set.distinct()
    lines = list(evaluation_set.lines(["a", "b"], said))
    assert [line["voice"] for line in lines] == list(evaluation_set.DISTINCT)[:2]
    assert all(recorded[line["voice"]] == line["prompt_text"] for line in lines)
