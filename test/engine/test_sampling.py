import math
from pathlib import Path

import numpy as np
import pytest
import torch

from light_tts.common.random import Purpose, gumbel, stream_of
from light_tts.common.sampling import NO_TOKEN, SamplingRules, ban, draw, greedy
from light_tts.common.sampling_rule import MAX_WIN_SIZE, SamplingRule
from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.server.core.messages import SpeechOptions
from light_tts.server.tts_llm.parts import sampling_rule
from light_tts.tools.parity import Golden
from light_tts.tools.parity.llm import official_sampling

GOLDEN = Golden(Path(__file__).parents[1] / "golden" / "cosyvoice2")
RULE = SamplingRule(top_p=0.8, top_k=25, win_size=10, tau_r=0.1)
RULES = [
    RULE,
    SamplingRule(top_p=0.5, top_k=8, win_size=10, tau_r=0.2),
    SamplingRule(top_p=0.95, top_k=64, win_size=MAX_WIN_SIZE, tau_r=0.04, temperature=1.3),
    SamplingRule(top_p=1.0, top_k=3, win_size=1, tau_r=1.0, temperature=0.6),
    SamplingRule(top_p=0.9, top_k=1, win_size=5, tau_r=2.0),
]


def reference(
    scores: list[float], rule: SamplingRule, history: list[int], seed: int, part: int, step: int
) -> int:
    """The definition for one request, step by step, with the same noise."""

    def pick(candidates: dict[int, float], purpose: Purpose) -> int:
        ids = list(candidates)
        counters = torch.tensor(ids) + step * len(scores)
        noise = gumbel(seed, stream_of(purpose, part), counters).tolist()
        return max(zip(ids, noise, strict=True), key=lambda pair: candidates[pair[0]] + pair[1])[0]

    scores = [score / rule.temperature for score in scores]
    total = math.log(sum(math.exp(score) for score in scores))
    nucleus, mass = {}, 0.0
    for token in sorted(range(len(scores)), key=lambda token: -scores[token]):
        if mass >= rule.top_p or len(nucleus) == rule.top_k:
            break
        nucleus[token] = scores[token] - total
        mass += math.exp(scores[token] - total)
    token = pick(nucleus, Purpose.NUCLEUS)
    if history[-rule.win_size :].count(token) >= rule.win_size * rule.tau_r:
        token = pick({i: s for i, s in enumerate(scores) if i != token and s > -math.inf}, Purpose.FALLBACK)
    return token


def padded(history: list[int]) -> list[int]:
    latest = history[-MAX_WIN_SIZE:]
    return [NO_TOKEN] * (MAX_WIN_SIZE - len(latest)) + latest


def requests(n: int, vocabulary: int = 200) -> dict:
    generator = torch.Generator().manual_seed(n)
    scores = 3 * torch.randn(n, vocabulary, generator=generator)
    top = scores.topk(12).indices.tolist()
    return {
        "scores": scores.log_softmax(-1),
        "rules": [RULES[i % len(RULES)] for i in range(n)],
        "history": [row[: i % 12] for i, row in enumerate(top)],  # likely tokens, so that many repeat
        "seeds": torch.randint(-(2**62), 2**62, (n,), generator=generator),
        "parts": torch.arange(n) % 3,
        "steps": torch.arange(n) * 7,
    }


def sample(batch: dict, rows: slice = slice(None), device: str = "cpu") -> torch.Tensor:
    history = torch.tensor([padded(h) for h in batch["history"]])
    tensors = (history, batch["seeds"], batch["parts"], batch["steps"])
    rules = SamplingRules.of(batch["rules"][rows], device)
    scores, *rest = (x[rows].to(device) for x in (batch["scores"], *tensors))
    return draw(scores, rules, *rest).cpu()


def test_nucleus_and_fallback_are_the_official_ones():
    for comparison in official_sampling(GOLDEN):
        np.testing.assert_allclose(
            np.asarray(comparison.got),
            comparison.expected,
            rtol=0,
            atol=comparison.tolerance,
            err_msg=comparison.stage,
        )


def test_batch_draws_what_the_definition_draws_for_each_request():
    batch = requests(64)
    drawn = sample(batch).tolist()
    names = ("scores", "rules", "history", "seeds", "parts", "steps")
    rows = zip(*(batch[name] for name in names), strict=True)
    assert drawn == [reference(s.tolist(), r, h, int(a), int(b), int(c)) for s, r, h, a, b, c in rows]


def test_a_request_draws_the_same_token_in_any_batch():
    batch = requests(16)
    together = sample(batch)
    assert torch.equal(together[3:7], sample(batch, slice(3, 7)))
    assert torch.equal(together[9:10], sample(batch, slice(9, 10)))


def test_draws_follow_the_distribution():
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20000, 4).contiguous()
    rules = SamplingRules.of([SamplingRule(top_p=0.85, top_k=25, win_size=2, tau_r=0.5)] * 20000)
    history = torch.full((20000, 2), NO_TOKEN)
    zeros = torch.zeros(20000, dtype=torch.long)
    counts = torch.bincount(draw(scores, rules, history, zeros + 5, zeros, torch.arange(20000)), minlength=4)
    expected = torch.tensor([4, 3, 2, 0]) / 9  # the id that crosses top_p is in, the next is not
    assert torch.allclose(counts / 20000, expected, atol=0.012)
    history[:, 1] = 0  # an output 0 must be drawn again, from all but 0
    counts = torch.bincount(draw(scores, rules, history, zeros + 5, zeros, torch.arange(20000)), minlength=4)
    expected = torch.tensor([0, 3, 2, 0]) / 9 + 4 / 9 * torch.tensor([0, 3, 2, 1]) / 6
    assert torch.allclose(counts / 20000, expected, atol=0.012)


def test_banned_ids_are_never_drawn():
    batch = requests(64)
    banned = torch.zeros(64, 60, dtype=torch.bool)
    banned[::2] = True
    batch["scores"] = ban(batch["scores"], 140, banned)
    assert (sample(batch)[::2] < 140).all() and (greedy(batch["scores"])[::2] < 140).all()
    assert (sample(batch)[1::2] >= 140).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_the_same_tokens():
    batch = requests(64)
    assert torch.equal(sample(batch, device="cuda"), sample(batch))


def test_a_low_temperature_prefers_the_probable_and_a_high_one_does_not():
    scores = torch.tensor([0.6, 0.3, 0.1]).log().expand(20000, 3).contiguous()
    history, zeros = torch.full((20000, 1), NO_TOKEN), torch.zeros(20000, dtype=torch.long)
    for temperature in (0.5, 1.0, 2.0):
        rule = SamplingRule(top_p=1.0, top_k=3, win_size=1, tau_r=2.0, temperature=temperature)
        rules = SamplingRules.of([rule] * 20000)
        counts = torch.bincount(draw(scores, rules, history, zeros, zeros, torch.arange(20000)), minlength=3)
        expected = torch.tensor([0.6, 0.3, 0.1]) ** (1 / temperature)
        assert torch.allclose(counts / 20000, expected / expected.sum(), atol=0.012)


def test_the_rule_of_a_request_is_the_checkpoints_unless_it_says_otherwise():
    default = load_config(GOLDEN.checkpoint).llm.sampling
    assert default == SamplingRule(top_p=0.8, top_k=25, win_size=10, tau_r=0.1, temperature=1.0)
    assert sampling_rule(SpeechOptions(seed=1), default) == default
    options = SpeechOptions(seed=1, top_p=0.5, temperature=0.7)
    assert sampling_rule(options, default) == SamplingRule(0.5, 25, 10, 0.1, 0.7)
