"""Creates a complete checkpoint with random weights in the real file formats.

It produces noise, but everything runs, which is enough for tests and speed measurements.

python scripts/make_tiny_checkpoint.py --out pretrained_models/tiny                a small one, 4 MB
python scripts/make_tiny_checkpoint.py --out pretrained_models/full --size full    sizes of CosyVoice2-0.5B
python scripts/make_tiny_checkpoint.py --out DIR --family cosyvoice3 --size full   of Fun-CosyVoice3-0.5B

The text tokenizer and the two ONNX models are always the small ones of the golden data.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from light_tts.models.checkpoint.cosyvoice2_config import Config, load_config
from light_tts.models.flow.flow import Flow, FlowShapes
from light_tts.models.llm.speech_lm import Qwen2Config, SpeechLM
from light_tts.models.vocoder.hift import Hift
from light_tts.tools import tiny_cosyvoice3
from light_tts.tools.random_weights import RandomWeights, copy_small_parts, hift_state, save, speakers

TEMPLATE = Path(__file__).with_name("cosyvoice2.yaml.template")
SMALL_PARTS = Path(__file__).resolve().parents[2] / "test" / "golden" / "cosyvoice2" / "checkpoint"


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
    parser.add_argument("--family", choices=("cosyvoice2", "cosyvoice3"), default="cosyvoice2")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        sys.exit(f"{args.out} exists and is not an empty directory")
    # Renamed when complete, so that a directory with the final name is always usable.
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if args.family == "cosyvoice2":
        make_checkpoint(partial, SIZES[args.size], args.seed)
    else:
        tiny_cosyvoice3.make_checkpoint(partial, tiny_cosyvoice3.SIZES[args.size], args.seed)
    if args.out.exists():
        args.out.rmdir()
    partial.rename(args.out)
    print(f"{args.out} is complete", flush=True)


def make_checkpoint(out: Path, sizes: CheckpointSizes, seed: int) -> None:
    """Write all files of a checkpoint to the new directory `out`."""
    copy_small_parts(SMALL_PARTS, out, asdict(sizes))
    (out / "cosyvoice2.yaml").write_text(TEMPLATE.read_text().format(**asdict(sizes)))
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


if __name__ == "__main__":
    main()
