"""CosyVoice3 checkpoints with random weights (see tiny_checkpoint.py)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from light_tts.models.checkpoint.cosyvoice3_config import Config3, load_config3
from light_tts.models.flow.dit.flow import DiTFlow
from light_tts.models.llm.speech_lm import Qwen2Config, SpeechLM
from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.tools.random_weights import RandomWeights, copy_small_parts, hift_state, save, speakers

TEMPLATE = Path(__file__).with_name("cosyvoice3.yaml.template")
SMALL_PARTS = Path(__file__).resolve().parents[2] / "test" / "golden" / "cosyvoice3" / "checkpoint"


@dataclass(frozen=True)
class CheckpointSizes:
    """Sizes of a checkpoint. The first group is written to the yaml, the second to the backbone's
    config.json."""

    hidden_size: int
    speech_token_size: int
    lookahead_channels: int
    dit_dim: int
    dit_depth: int
    dit_heads: int
    dit_head_dim: int
    hift_channels: int
    f0_channels: int

    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


SIZES = {
    "tiny": CheckpointSizes(
        hidden_size=64,
        speech_token_size=729,
        lookahead_channels=96,
        dit_dim=64,
        dit_depth=2,
        dit_heads=4,
        dit_head_dim=16,
        hift_channels=32,
        f0_channels=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1152,
    ),
    "full": CheckpointSizes(
        hidden_size=896,
        speech_token_size=6561,
        lookahead_channels=1024,
        dit_dim=1024,
        dit_depth=22,
        dit_heads=16,
        dit_head_dim=64,
        hift_channels=512,
        f0_channels=512,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
    ),
}


def make_checkpoint(out: Path, sizes: CheckpointSizes, seed: int) -> None:
    """Write all files of a checkpoint to the new directory `out`."""
    copy_small_parts(SMALL_PARTS, out, asdict(sizes))
    (out / "cosyvoice3.yaml").write_text(TEMPLATE.read_text().format(**asdict(sizes)))
    config = load_config3(out)
    weights = RandomWeights(seed)
    with torch.device("meta"):
        llm = SpeechLM(Qwen2Config.load(out), config.llm)
        flow = DiTFlow(config.flow)
        hift = CausalHift(config.hift)
    save(out / "llm.pt", llm_state(weights.like(llm), config))
    save(out / "flow.pt", flow_state(weights.like(flow)))
    save(out / "hift.pt", hift_state(weights.like(hift)))
    save(out / "spk2info.pt", speakers(weights, config))


def llm_state(state: dict[str, Tensor], config: Config3) -> dict[str, Tensor]:
    """Set logits that differ enough for varied sampling, and rare ends: there is no bias, so the end's logit
    only varies more than the others."""
    spread, spread_of_end = 2.5, 4.0
    special = config.llm.speech_token_size
    eos = special + config.llm.special.eos
    end = state["llm_decoder.weight"][eos].clone()
    state["llm_decoder.weight"].mul_(spread)[special:] = 0.0
    state["llm_decoder.weight"][eos] = spread_of_end * end
    state["llm.model.lm_head.weight"] = state["llm.model.model.embed_tokens.weight"]  # tied
    return state


def flow_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Set a level of mel frames similar to speech: the bias of the velocity determines the drift of the
    noise. The frequencies of the rotary embedding are constants."""
    state["decoder.estimator.proj_out.bias"] -= 5.0
    frequencies = state["decoder.estimator.rotary_embed.inv_freq"]
    frequencies.copy_(1.0 / 10000 ** (torch.arange(len(frequencies)) / len(frequencies)))
    return state
