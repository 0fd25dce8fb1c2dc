"""Samples the next token of every request in a batch without host synchronization.

Repetition-aware sampling (CosyVoice2): a nucleus sample; if that token is already among the latest ones, a
sample from the full distribution without it. Uses the Gumbel-max trick with counter-based noise, so a
request's sample depends only on its rule, seed, part and step, and rounding hardly ever changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from light_tts.common.random import Purpose, gumbel, stream_of
from light_tts.common.sampling_rule import SamplingRule

NO_TOKEN = -1  # pads a history shorter than the window


@dataclass(frozen=True)
class SamplingRules:
    """One `SamplingRule` per request as (batch,) tensors; `top_p` and `inverse_temperature` are float32, the
    others int32."""

    top_p: Tensor
    top_k: Tensor
    win_size: Tensor
    repeats: Tensor
    inverse_temperature: Tensor

    @classmethod
    def of(cls, rules: Sequence[SamplingRule], device: torch.device | str = "cpu") -> SamplingRules:
        def numbers(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([getattr(rule, name) for rule in rules], dtype=dtype, device=device)

        return cls(
            top_p=numbers("top_p", torch.float32),
            top_k=numbers("top_k", torch.int32),
            win_size=numbers("win_size", torch.int32),
            repeats=numbers("repeats", torch.int32),
            inverse_temperature=numbers("inverse_temperature", torch.float32),
        )


def greedy(scores: Tensor) -> Tensor:
    """Return the most probable tokens. scores: (batch, vocabulary) -> (batch,) int64"""
    return scores.argmax(-1)


def ban(scores: Tensor, first: int, banned: Tensor) -> Tensor:
    """Return `scores` with -inf where `banned` is set. `banned`: (batch, n) bool, for the ids from `first`
    on."""
    scores = scores.clone()
    scores[:, first : first + banned.shape[1]].masked_fill_(banned, -torch.inf)
    return scores


def draw(
    scores: Tensor, rules: SamplingRules, history: Tensor, seeds: Tensor, parts: Tensor, steps: Tensor
) -> Tensor:
    """Repetition-aware sampling.

    scores: (batch, vocabulary) float32, log-probabilities up to a constant (-inf: impossible);
    history: (batch, any) int64, the latest tokens, newest last, padded with NO_TOKEN;
    seeds, parts, steps: (batch,) int64, `steps` counts the part's tokens so far -> (batch,) int64
    """
    scores = scores * rules.inverse_temperature[:, None]
    counters = steps[:, None] * scores.shape[1]
    ids, log_probs = nucleus(scores, rules.top_p, rules.top_k)
    noise = gumbel(seeds[:, None], stream_of(Purpose.NUCLEUS, parts)[:, None], counters + ids)
    drawn = ids.gather(1, (log_probs + noise).argmax(-1, keepdim=True))

    again = repeated(drawn, history, rules)
    if again.device.type == "cpu" and not again.any():  # on a GPU this test would synchronize
        return drawn[:, 0]
    every_id = torch.arange(scores.shape[1], device=scores.device)
    noise = gumbel(seeds[:, None], stream_of(Purpose.FALLBACK, parts)[:, None], counters + every_id)
    other = (others(scores, drawn) + noise).argmax(-1)
    return torch.where(again, other, drawn[:, 0])


def nucleus(scores: Tensor, top_p: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """Return (ids, log-probabilities), each (batch, largest top_k), most probable first; ids outside the
    nucleus have log-probability -inf. The id that crosses `top_p` is inside."""
    # A full stable sort, so that ties are ordered by id.
    log_probs, ids = scores.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    if scores.device.type == "cpu":  # on a GPU this would synchronize
        most = int(top_k.max())
        log_probs, ids = log_probs[:, :most], ids[:, :most]
    # nearly exact, because a kernel adds in a different order
    mass = log_probs.exp().double().cumsum(-1).float()
    inside = torch.arange(ids.shape[1], device=ids.device) < top_k[:, None]
    inside[:, 1:] &= mass[:, :-1] < top_p[:, None]
    return ids, log_probs.masked_fill(~inside, -torch.inf)


def others(scores: Tensor, drawn: Tensor) -> Tensor:
    """Return `scores` with -inf at the rejected ids. drawn: (batch, 1) int64 -> (batch, vocabulary)"""
    return scores.scatter(1, drawn, -torch.inf)


def repeated(drawn: Tensor, history: Tensor, rules: SamplingRules) -> Tensor:
    """Return which of the drawn ids (batch, 1) must be resampled. -> (batch,) bool"""
    age = torch.arange(history.shape[1] - 1, -1, -1, device=history.device)
    seen = (history == drawn) & (age < rules.win_size[:, None])
    return seen.sum(-1) >= rules.repeats
