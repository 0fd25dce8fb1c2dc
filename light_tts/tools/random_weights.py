"""Random weights for checkpoints without training: everything runs, and what it says is noise."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from light_tts.models.checkpoint.config import CommonConfig
from light_tts.models.llm.speech_lm import BACKBONE_DIR

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json")


def copy_small_parts(parts: Path, out: Path, sizes: Mapping[str, object]) -> None:
    """Create the directory `out` with the ONNX models and the text tokenizer of the checkpoint `parts`, and
    with its backbone's config.json changed to `sizes`."""
    backbone_dir = out / BACKBONE_DIR
    backbone_dir.mkdir(parents=True)
    for path in parts.glob("*.onnx"):
        if not path.name.startswith("flow."):  # an export of its flow
            shutil.copyfile(path, out / path.name)
    for name in TOKENIZER_FILES:
        shutil.copyfile(parts / BACKBONE_DIR / name, backbone_dir / name)
    backbone = json.loads((parts / BACKBONE_DIR / "config.json").read_text())
    backbone.update({name: value for name, value in sizes.items() if name in backbone})
    (backbone_dir / "config.json").write_text(json.dumps(backbone, indent=2))


class RandomWeights:
    """Generates tensors that preserve the level of their input."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self._generator).mul_(std).add_(mean)

    def like(self, module: nn.Module) -> dict[str, Tensor]:
        """Return random values for every tensor of `module`, which may be on the meta device."""
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        upsampling = {name for name, part in module.named_modules() if isinstance(part, nn.ConvTranspose1d)}
        return {name: self._tensor(name, shapes, upsampling) for name in shapes}

    def _tensor(self, name: str, shapes: Mapping[str, tuple[int, ...]], upsampling: set[str]) -> Tensor:
        shape = shapes[name]
        last = name.rsplit(".", 1)[-1]
        if last == "alpha":  # of a snake
            return self.normal(*shape, mean=1.0, std=0.2).clamp_(min=0.3)
        if last == "original0":  # row lengths of a weight-normed tensor
            conv, rows = name.removesuffix(".parametrizations.weight.original0"), name.removesuffix("0") + "1"
            length = row_length(conv, shapes[rows], conv in upsampling)
            return self.normal(*shape, mean=1.0, std=0.1) * length
        if last == "original1" or "embed" in name.split(".")[-2]:
            return self.normal(*shape)
        if last == "bias" or last.startswith("pos_bias"):
            return self.normal(*shape, std=0.05)
        if len(shape) == 1:  # of a norm
            return self.normal(*shape, mean=1.0, std=0.1)
        return self.normal(*shape, std=1.0 / math.sqrt(math.prod(shape[1:])))


def row_length(name: str, shape: tuple[int, ...], transposed: bool) -> float:
    """Return the length of the rows (first axis) of a weight-normed convolution that preserves the level of
    its input."""
    if transposed:  # one row per input channel; kernels are two strides long
        return math.sqrt(shape[1] * (shape[2] / 2) / shape[0])
    # mel spectrograms have a high level, the logarithms of spectra do not
    quiet = {"conv_pre": 0.2, "conv_post": 0.3}
    return 0.35 if ".convs2." in name else quiet.get(name.split(".")[0], 1.0)


def hift_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Set a pitch typical of a human voice."""
    state["f0_predictor.classifier.weight"].mul_(40.0)
    state["f0_predictor.classifier.bias"].fill_(180.0)
    return state


def speakers(weights: RandomWeights, config: CommonConfig) -> dict[str, dict[str, object]]:
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


def save(path: Path, content: Mapping[str, object]) -> None:
    torch.save(dict(content), path)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
