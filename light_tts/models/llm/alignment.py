"""Word timing from the language model's attention: some heads attend to the text being spoken. The
checkpoint's configuration lists them as `alignment_heads`."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from light_tts.models.checkpoint.weights import CheckpointError
from light_tts.models.llm.interface import Positions
from light_tts.models.llm.speech_lm import SpeechLM, rotary_table

Heads = tuple[tuple[int, int], ...]  # (layer, head) pairs
_LEAST = 1e-4  # minimum attention share of any word


class AttentionAligner:
    """Computes the attention of `heads` for a finished part in one pass through the layers up to theirs. It
    needs nothing from the generation, which is therefore not slowed down for other requests."""

    def __init__(self, model: SpeechLM, heads: Heads) -> None:
        """Raises CheckpointError if the model does not have these heads."""
        backbone = model.backbone
        layers, count = backbone.num_hidden_layers, backbone.num_attention_heads
        if not all(layer < layers and head < count for layer, head in heads):
            raise CheckpointError(
                f"alignment_heads {list(heads)}: the model has {layers} layers of {count} heads"
            )
        self._model = model
        self._heads = heads

    @torch.inference_mode()
    def __call__(self, inputs: list[int], text: Positions, speech: Positions, words: list[int]) -> np.ndarray:
        """Implements `Aligner`."""
        if not words or not len(speech):
            return np.zeros((len(speech), len(words)), np.float32)
        said_by = np.asarray(speech) - 1  # positions whose outputs are the speech tokens
        share = self._attention(inputs)[np.ix_(said_by, np.asarray(text))]  # (tokens, text)
        borders = np.cumsum([0, *words])[:-1]
        return np.add.reduceat(share, borders, axis=1)

    def _attention(self, inputs: list[int]) -> np.ndarray:
        """Return (queries, keys) float32, the mean over the heads."""
        model, found = self._model, []
        device = model.embedding.weight.device
        ids = torch.tensor(inputs, device=device)
        positions = torch.arange(len(inputs), device=device)
        future = torch.ones(len(inputs), len(inputs), dtype=torch.bool, device=device).triu(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
            group = q.shape[1] // k.shape[1]
            for head in (head for at, head in self._heads if at == layer):
                scores = q[:, head].float() @ k[:, head // group].float().T / math.sqrt(q.shape[2])
                found.append(scores.masked_fill(future, -math.inf).softmax(-1))
            out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1)

        x = model.embed(ids)
        backbone = model.backbone
        rotary = rotary_table(positions, backbone.head_dim, backbone.rope_theta, x.dtype)
        last = max(layer for layer, _ in self._heads)
        for index, layer in enumerate(model.llm.model.model.layers[: last + 1]):
            x = layer(x, rotary, index, attend)
        return torch.stack(found).mean(0).cpu().numpy()


def times_of_words(share: np.ndarray, ended: bool = True) -> list[int]:
    """share: (tokens, words), see `Aligner` -> (2 * words,): of each word the token with which it begins, and
    the one behind its last. Not `ended`, more will be spoken: only of the words that have been spoken to
    their end."""
    tokens, words = share.shape
    if tokens and words:
        return spans(np.log(share + _LEAST), ended)
    return [0] * 2 * words if ended else []


def spans(scores: np.ndarray, ended: bool = True) -> list[int]:
    """scores: (tokens, words), how well each word matches each token -> for each word its first token and the
    one after its last, on the best monotonic path from the first word to the last. No word is skipped unless
    there are fewer tokens than words. Not `ended`: the path may end at any word, and only the words before
    that one are returned."""
    tokens, words = scores.shape
    best = np.full(words, -np.inf)
    best[0] = scores[0, 0]
    moved = np.zeros((tokens, words), bool)
    for token in range(1, tokens):
        before = np.concatenate(([-np.inf], best[:-1]))
        moved[token] = before > best
        best = np.maximum(best, before) + scores[token]
    path = np.empty(tokens, np.int64)
    path[-1] = min(tokens, words) - 1 if ended else np.argmax(best)
    for token in range(tokens - 1, 0, -1):
        path[token - 1] = path[token] - moved[token, path[token]]
    found = np.arange(words if ended else path[-1])
    first = np.searchsorted(path, found, side="left")
    behind = np.searchsorted(path, found, side="right")
    return np.stack([first, behind], 1).ravel().tolist()
