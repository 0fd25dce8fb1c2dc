"""Creates a complete CosyVoice2 checkpoint with random weights in the real file formats.

It produces noise, but everything runs, which is enough for tests and speed measurements.

python scripts/make_tiny_checkpoint.py --out pretrained_models/tiny                a small one, 4 MB
python scripts/make_tiny_checkpoint.py --out pretrained_models/full --size full    sizes of CosyVoice2-0.5B

The text tokenizer and the two ONNX models are always the small ones of the golden data.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from light_tts.models.checkpoint.config import Config, load_config
from light_tts.models.flow.flow import Flow, FlowShapes
from light_tts.models.llm.speech_lm import BACKBONE_DIR, Qwen2Config, SpeechLM
from light_tts.models.vocoder.hift import Hift

TEMPLATE = Path(__file__).with_name("cosyvoice2.yaml.template")
SMALL_PARTS = Path(__file__).resolve().parents[2] / "test" / "golden" / "cosyvoice2" / "checkpoint"
ONNX_FILES = ("campplus.onnx", "speech_tokenizer_v2.onnx")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class CheckpointSizes:
    """Sizes of a checkpoint. The first group is written to the yaml, the second to the backbone's
    config.json; the third only determines tensor shapes; the last holds other settings in the yaml: sampling
    parameters and the flow's steps."""

    hidden_size: int
    speech_token_size: int
    encoder_size: int
    encoder_heads: int
    encoder_units: int
    encoder_blocks: int
    estimator_channels: int
    estimator_head_dim: int
    estimator_heads: int
    estimator_blocks: int
    estimator_mid_blocks: int
    hift_channels: int
    f0_channels: int

    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    up_blocks: int
    lookahead_channels: int

    top_p: float = 0.8
    top_k: int = 25
    win_size: int = 10
    tau_r: float = 0.1
    n_timesteps: int = 10


SIZES = {
    "tiny": CheckpointSizes(
        hidden_size=64,
        speech_token_size=729,
        encoder_size=64,
        encoder_heads=4,
        encoder_units=128,
        encoder_blocks=2,
        estimator_channels=32,
        estimator_head_dim=12,
        estimator_heads=2,
        estimator_blocks=2,
        estimator_mid_blocks=2,
        hift_channels=32,
        f0_channels=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=832,
        up_blocks=1,
        lookahead_channels=64,
    ),
    "full": CheckpointSizes(
        hidden_size=896,
        speech_token_size=6561,
        encoder_size=512,
        encoder_heads=8,
        encoder_units=2048,
        encoder_blocks=6,
        estimator_channels=256,
        estimator_head_dim=64,
        estimator_heads=8,
        estimator_blocks=4,
        estimator_mid_blocks=12,
        hift_channels=512,
        f0_channels=512,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        up_blocks=4,
        lookahead_channels=512,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory to create; must not exist or must be empty"
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        sys.exit(f"{args.out} exists and is not an empty directory")
    # Renamed when complete, so that a directory with the final name is always usable.
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_checkpoint(partial, SIZES[args.size], args.seed)
    if args.out.exists():
        args.out.rmdir()
    partial.rename(args.out)
    print(f"{args.out} is complete", flush=True)


def make_checkpoint(out: Path, sizes: CheckpointSizes, seed: int) -> None:
    """Write all files of a checkpoint to the new directory `out`."""
    backbone_dir = out / BACKBONE_DIR
    backbone_dir.mkdir(parents=True)
    for name in ONNX_FILES:
        shutil.copyfile(SMALL_PARTS / name, out / name)
    for name in TOKENIZER_FILES:
        shutil.copyfile(SMALL_PARTS / BACKBONE_DIR / name, backbone_dir / name)
    (out / "cosyvoice2.yaml").write_text(TEMPLATE.read_text().format(**asdict(sizes)))
    backbone = json.loads((SMALL_PARTS / BACKBONE_DIR / "config.json").read_text())
    backbone.update({name: value for name, value in asdict(sizes).items() if name in backbone})
    (backbone_dir / "config.json").write_text(json.dumps(backbone, indent=2))

    config = load_config(out)
    weights = RandomWeights(seed)
    with torch.device("meta"):
        llm = SpeechLM(Qwen2Config.load(out), config.llm)
        flow = Flow(config.flow, flow_shapes(sizes))
        hift = Hift(config.hift)
    save(out / "llm.pt", llm_state(weights.like(llm), config))
    save(out / "flow.pt", flow_state(weights.like(flow)))
    save(out / "hift.pt", hift_state(weights.like(hift)))
    save(out / "spk2info.pt", speakers(weights, config))


def flow_shapes(sizes: CheckpointSizes) -> FlowShapes:
    return FlowShapes(
        num_up_blocks=sizes.up_blocks,
        lookahead_channels=sizes.lookahead_channels,
        up_channels=sizes.encoder_size,
        time_embed_dim=4 * sizes.estimator_channels,
    )


def save(path: Path, content: Mapping[str, object]) -> None:
    torch.save(dict(content), path)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB", flush=True)


class RandomWeights:
    """Generates tensors that preserve the level of their input."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self._generator).mul_(std).add_(mean)

    def like(self, module: nn.Module) -> dict[str, Tensor]:
        """Return random values for every tensor of `module`, which may be on the meta device."""
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        return {name: self._tensor(name, shapes) for name in shapes}

    def _tensor(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
        shape = shapes[name]
        last = name.rsplit(".", 1)[-1]
        if last == "alpha":  # of a snake
            return self.normal(*shape, mean=1.0, std=0.2).clamp_(min=0.3)
        if last == "original0":  # row lengths of a weight-normed tensor
            return self.normal(*shape, mean=1.0, std=0.1) * row_length(
                name, shapes[name.removesuffix("0") + "1"]
            )
        if last == "original1" or "embed" in name.split(".")[-2]:
            return self.normal(*shape)
        if last == "bias" or last.startswith("pos_bias"):
            return self.normal(*shape, std=0.05)
        if len(shape) == 1:  # of a norm
            return self.normal(*shape, mean=1.0, std=0.1)
        return self.normal(*shape, std=1.0 / math.sqrt(math.prod(shape[1:])))


def row_length(name: str, shape: tuple[int, ...]) -> float:
    """Return the length of the rows (first axis) of a weight-normed convolution that preserves the level of
    its input."""
    if name.startswith("ups."):  # transposed: one row per input channel; kernels are two strides long
        return math.sqrt(shape[1] * (shape[2] / 2) / shape[0])
    # mel spectrograms have a high level, the logarithms of spectra do not
    quiet = {"conv_pre": 0.2, "conv_post": 0.3}
    return 0.35 if ".convs2." in name else quiet.get(name.split(".")[0], 1.0)


def llm_state(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Set logits that differ enough for varied sampling, and an end about once in 40 steps."""
    spread, end_probability = 2.5, 0.025
    eos = config.llm.speech_token_size
    state["llm_decoder.weight"].mul_(spread)[eos:] *= 0.01
    state["llm_decoder.bias"][eos] = math.log(end_probability * eos) + spread**2 / 2
    state["llm_decoder.bias"][eos + 1 :] = -20.0  # no training example ends with these
    state["llm.model.lm_head.weight"] = state["llm.model.model.embed_tokens.weight"]  # tied
    return state


def flow_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Set a level of mel frames similar to speech: the bias of the velocity determines the drift of the
    noise."""
    state["decoder.estimator.final_proj.bias"] -= 5.0
    return state


def hift_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Set a pitch typical of a human voice."""
    state["f0_predictor.classifier.weight"].mul_(40.0)
    state["f0_predictor.classifier.bias"].fill_(180.0)
    return state


def speakers(weights: RandomWeights, config: Config) -> dict[str, dict[str, object]]:
    """Return one voice of each kind: only an embedding, and one created from a recording."""
    width, mels, tokens = config.spk_embed_dim, config.mel.num_mels, 50
    token = weights.normal(1, tokens, std=100.0).abs().long() % config.llm.speech_token_size
    mel = weights.normal(1, tokens * config.token_mel_ratio, mels, mean=-5.0, std=1.5)
    embedding = weights.normal(1, width)
    token_len = torch.tensor([tokens], dtype=torch.int32)
    recorded: dict[str, object] = {
        "prompt_text": torch.arange(40, 50, dtype=torch.int32)[None],
        "prompt_text_len": torch.tensor([10], dtype=torch.int32),
        "llm_prompt_speech_token": token.int(),
        "llm_prompt_speech_token_len": token_len,
        "flow_prompt_speech_token": token.int(),
        "flow_prompt_speech_token_len": token_len,
        "prompt_speech_feat": mel,
        "prompt_speech_feat_len": torch.tensor([mel.shape[1]], dtype=torch.int32),
        "llm_embedding": embedding,
        "flow_embedding": embedding,
    }
    embedded: dict[str, object] = {"embedding": weights.normal(1, width)}
    return {"embedded_voice": embedded, "recorded_voice": recorded}


if __name__ == "__main__":
    main()
