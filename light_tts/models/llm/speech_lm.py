"""The speech language model: a Qwen2 backbone that reads text and speech tokens and predicts speech tokens.

Text ids, speech ids and the two marks (start of sequence, task) share one embedding table, so a request is
one list of unified ids:

    [0, text)              text ids of the tokenizer
    [text, text + speech)  speech ids, the special ones included
    sos, task              the last two rows, unless they are special speech ids

Batches are flat: the tokens of all requests are concatenated without padding. Only the attention, which is
passed in, knows where each request ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.checkpoint.config import CommonConfig, LLMConfig, SpecialIds
from light_tts.models.checkpoint.weights import CheckpointError, load_into, load_state_dict, on_meta

BACKBONE_DIR = "CosyVoice-BlankEN"


@dataclass(frozen=True)
class Qwen2Config:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float

    @classmethod
    def load(cls, model_dir: Path) -> Qwen2Config:
        """Read the backbone's config.json. Raises CheckpointError naming the file and the key."""
        path = Path(model_dir) / BACKBONE_DIR / "config.json"
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected an object")
        # transformers 5 keeps the rotary settings in a separate group
        values = {**(values.get("rope_parameters") or {}), **values}
        if values.get("rope_scaling") or values.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{path}: rope_scaling or hidden_act is not supported")
        try:
            values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
            return cls(**{name: values[name] for name in cls.__dataclass_fields__})
        except KeyError as missing:
            raise CheckpointError(f"{path}: key {missing} is missing") from None


@dataclass(frozen=True)
class SpeechIds:
    """The layout of unified ids; `speech_tokens` is the number of speech ids below the special ones."""

    text_vocab: int
    speech_tokens: int
    special: SpecialIds

    @property
    def speech_vocab(self) -> int:
        """Number of speech ids, including the special ones."""
        return self.speech_tokens + self.special.count

    @property
    def eos(self) -> int:
        """Speech id."""
        return self.speech_tokens + self.special.eos

    @property
    def fill(self) -> int:
        """Speech id."""
        return self.speech_tokens + self.special.fill

    @property
    def stop(self) -> range:
        """Speech ids that end a part that is not bistream; none of them is ever spoken."""
        return range(self.speech_tokens, self.speech_vocab)

    @property
    def table_of_marks(self) -> bool:
        """Whether sos and task have a table of their own, behind that of the speech ids."""
        return self.special.sos is None

    @property
    def sos(self) -> int:
        """Unified id."""
        return self._mark(self.special.sos, 0)

    @property
    def task(self) -> int:
        """Unified id."""
        return self._mark(self.special.task, 1)

    def speech(self, token: int) -> int:
        """Return the unified id of a speech id."""
        return self.text_vocab + token

    def spoken(self, tokens: Iterable[int]) -> list[int]:
        """Return the unified ids of speech ids."""
        first = self.text_vocab
        return [first + token for token in tokens]

    def _mark(self, special: int | None, row: int) -> int:
        """Return the unified id of a mark: that of its special id or, if it has none, of its row in the table
        of marks."""
        return self.speech(self.speech_vocab + row if special is None else self.speech_tokens + special)


class AttentionContext(Protocol):
    """Attention of one batch over the KV cache (see engine/llm/attention.py)."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, then attend causally within each request. q: (tokens, heads, head_dim); k, v:
        (tokens, kv_heads, head_dim) -> (tokens, heads, head_dim)"""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, in float32."""
    full = x.float()
    return weight * (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions: (tokens,) -> cos, sin: (tokens, 1, head_dim / 2)"""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.int64).float() / head_dim
    angles = positions[:, None].float() * (1.0 / theta**exponents)
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to (first half, second half) pairs. x: (tokens, heads, head_dim)"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(hidden, heads * self.head_dim)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], layer: int, attention: AttentionContext
    ) -> Tensor:
        """x: (tokens, hidden)"""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attention(layer, rotate(q, *rotary), rotate(k, *rotary), v)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(0.0)  # training increases it

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], layer: int, attention: AttentionContext
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, layer, attention))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Qwen2(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """The backbone as stored in the checkpoint, including the text head, which speech does not use."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.model = Qwen2(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class SpeechLM(nn.Module):
    """As constructed, parameters have the names and shapes of llm.pt; `merge_embeddings` (called by
    `from_checkpoint`) then prepares the model for inference.

    Without a table of marks (CosyVoice3), the decoder has no bias.
    """

    def __init__(self, backbone: Qwen2Config, config: LLMConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.ids = SpeechIds(backbone.vocab_size, config.speech_token_size, config.special)
        if self.ids.table_of_marks:
            self.llm_embedding = nn.Embedding(2, config.input_size)  # start of sequence, task
        self.llm: Any = nn.ModuleDict({"model": CausalLM(backbone)})
        self.llm_decoder = nn.Linear(config.output_size, self.ids.speech_vocab, bias=self.ids.table_of_marks)
        self.speech_embedding = nn.Embedding(self.ids.speech_vocab, config.input_size)

    @classmethod
    def from_checkpoint(
        cls,
        model_dir: Path,
        llm_path: Path,
        config: CommonConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> SpeechLM:
        """Load `llm_path` strictly. Raises CheckpointError."""
        backbone = Qwen2Config.load(model_dir)
        if not backbone.hidden_size == config.llm.input_size == config.llm.output_size:
            raise CheckpointError(
                f"{config.path}: llm_input_size or llm_output_size is not hidden_size "
                f"{backbone.hidden_size} of {BACKBONE_DIR}/config.json"
            )
        with on_meta():
            model = cls(backbone, config.llm).to(dtype)
        load_into(model, load_state_dict(llm_path), llm_path, unused=["llm.model.lm_head.weight"])
        return model.merge_embeddings().to(device).eval().requires_grad_(False)

    @property
    def tables(self) -> list[Tensor]:
        """The embeddings in the order of the unified ids, before they are merged."""
        tables = [self.llm.model.model.embed_tokens, self.speech_embedding]
        if self.ids.table_of_marks:
            tables.append(self.llm_embedding)
        return [table.weight for table in tables]

    def merge_embeddings(self) -> SpeechLM:
        """Merge the embedding tables into one and delete them and the text head."""
        self.embedding = nn.Embedding.from_pretrained(torch.cat(self.tables))
        del self.llm.model.model.embed_tokens, self.llm.model.lm_head, self.speech_embedding
        if self.ids.table_of_marks:
            del self.llm_embedding
        return self

    def embed(self, input_ids: Tensor) -> Tensor:
        """Unified ids (tokens,) -> (tokens, hidden)"""
        return self.embedding(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor, attention: AttentionContext) -> Tensor:
        """input_ids: (tokens,) unified ids; positions: (tokens,) within their requests -> (tokens, hidden),
        after the final norm"""
        return self.hidden(self.embed(input_ids), positions, attention)

    def hidden(self, x: Tensor, positions: Tensor, attention: AttentionContext) -> Tensor:
        """The same as `forward`, for embeddings x: (tokens, hidden)"""
        backbone = self.llm.model.model
        rotary = rotary_table(positions, self.backbone.head_dim, self.backbone.rope_theta, x.dtype)
        for index, layer in enumerate(backbone.layers):
            x = layer(x, rotary, index, attention)
        return backbone.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (batch, hidden) -> (batch, speech ids) float32"""
        return self.llm_decoder(hidden).float()
