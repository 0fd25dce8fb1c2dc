"""Drawing the next token of every request in a batch, without a host synchronisation.

Repetition-aware sampling (CosyVoice2): a nucleus draw; where the drawn token is already among the latest
ones, a draw from the full distribution without it. Draws are Gumbel-max with counter-based noise, so a
request's draw depends on its seed, part and step alone, and hardly ever changes by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from light_tts.common.random import Purpose, gumbel, stream_of

NO_TOKEN = -1  # fills up a history that is shorter than the window


def greedy(scores: Tensor) -> Tensor:
    """The most probable token. scores: (batch, vocabulary) -> (batch,) int64"""
    return scores.argmax(-1)


def ban(scores: Tensor, first: int, banned: Tensor) -> Tensor:
    """`scores` with -inf where `banned` says so; `banned`: (batch, n) bool, for the ids from `first` on."""
    scores = scores.clone()
    scores[:, first : first + banned.shape[1]].masked_fill_(banned, -torch.inf)
    return scores


@dataclass(frozen=True)
class RepetitionAwareSampler:
    """`top_p`, `top_k`: the nucleus is the smallest set of most probable tokens with a mass of at least
    `top_p`, and never more than `top_k`. A token seen at least `win_size * tau_r` times in the last
    `win_size` is drawn again."""

    top_p: float
    top_k: int
    win_size: int
    tau_r: float

    def __call__(
        self, scores: Tensor, history: Tensor, seeds: Tensor, parts: Tensor, steps: Tensor
    ) -> Tensor:
        """scores: (batch, vocabulary) float32, log-probabilities up to a constant (-inf: impossible);
        history: (batch, win_size) int64, the latest tokens, filled up with NO_TOKEN;
        seeds, parts, steps: (batch,) int64, `steps` counts the part's tokens so far -> (batch,) int64"""
        counters = steps[:, None] * scores.shape[1]
        ids, log_probs = self.nucleus(scores)
        noise = gumbel(seeds[:, None], stream_of(Purpose.NUCLEUS, parts)[:, None], counters + ids)
        drawn = ids.gather(1, (log_probs + noise).argmax(-1, keepdim=True))

        again = self.repeated(drawn, history)
        if again.device.type == "cpu" and not again.any():  # a GPU would have to be waited for
            return drawn[:, 0]
        every_id = torch.arange(scores.shape[1], device=scores.device)
        noise = gumbel(seeds[:, None], stream_of(Purpose.FALLBACK, parts)[:, None], counters + every_id)
        other = (self.others(scores, drawn) + noise).argmax(-1)
        return torch.where(again, other, drawn[:, 0])

    def nucleus(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """-> (ids, log-probabilities), each (batch, top_k), most probable first; ids outside the nucleus have
        log-probability -inf. The id that crosses `top_p` is inside."""
        # A full stable sort, since ties must fall in the order of the ids.
        log_probs, ids = scores.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
        log_probs, ids = log_probs[:, : self.top_k], ids[:, : self.top_k]
        mass = log_probs.exp().double().cumsum(-1).float()  # as good as exact: a kernel adds in another order
        inside = torch.ones_like(ids, dtype=torch.bool)
        inside[:, 1:] = mass[:, :-1] < self.top_p
        return ids, log_probs.masked_fill(~inside, -torch.inf)

    def others(self, scores: Tensor, drawn: Tensor) -> Tensor:
        """What is drawn from when `drawn`, (batch, 1), is rejected: all ids but this one."""
        return scores.scatter(1, drawn, -torch.inf)

    def repeated(self, drawn: Tensor, history: Tensor) -> Tensor:
        """Which of the drawn ids (batch, 1) must be drawn again. -> (batch,) bool"""
        return (history == drawn).sum(-1) >= self.win_size * self.tau_r
