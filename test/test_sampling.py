import math
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_checks import Golden
from parity_checks.llm import official_sampling

from light_tts.common.random import Purpose, gumbel, stream_of
from light_tts.common.sampling import NO_TOKEN, RepetitionAwareSampler, ban, greedy
from light_tts.models.cosyvoice2.config import load_config

GOLDEN = Golden(Path(__file__).parent / "golden" / "cosyvoice2")
SAMPLER = RepetitionAwareSampler(top_p=0.8, top_k=25, win_size=10, tau_r=0.1)


def reference(scores: list[float], history: list[int], seed: int, part: int, step: int) -> int:
    """The sampler's definition for one request, step by step, with the same noise."""

    def draw(candidates: dict[int, float], purpose: Purpose) -> int:
        ids = list(candidates)
        counters = torch.tensor(ids) + step * len(scores)
        noise = gumbel(seed, stream_of(purpose, part), counters).tolist()
        return max(zip(ids, noise, strict=True), key=lambda pair: candidates[pair[0]] + pair[1])[0]

    total = math.log(sum(math.exp(score) for score in scores))
    nucleus, mass = {}, 0.0
    for token in sorted(range(len(scores)), key=lambda token: -scores[token]):
        if mass >= SAMPLER.top_p or len(nucleus) == SAMPLER.top_k:
            break
        nucleus[token] = scores[token] - total
        mass += math.exp(scores[token] - total)
    token = draw(nucleus, Purpose.NUCLEUS)
    if history[-SAMPLER.win_size :].count(token) >= SAMPLER.win_size * SAMPLER.tau_r:
        token = draw({i: s for i, s in enumerate(scores) if i != token and s > -math.inf}, Purpose.FALLBACK)
    return token


def padded(history: list[int]) -> list[int]:
    latest = history[-SAMPLER.win_size :]
    return [NO_TOKEN] * (SAMPLER.win_size - len(latest)) + latest


def requests(n: int, vocabulary: int = 200) -> dict:
    generator = torch.Generator().manual_seed(n)
    scores = 3 * torch.randn(n, vocabulary, generator=generator)
    top = scores.topk(12).indices.tolist()
    return {
        "scores": scores.log_softmax(-1),
        "history": [row[: i % 12] for i, row in enumerate(top)],  # likely tokens, so that many repeat
        "seeds": torch.randint(-(2**62), 2**62, (n,), generator=generator),
        "parts": torch.arange(n) % 3,
        "steps": torch.arange(n) * 7,
    }


def sample(batch: dict, rows: slice = slice(None)) -> torch.Tensor:
    history = torch.tensor([padded(h) for h in batch["history"]])
    return SAMPLER(
        *(x[rows] for x in (batch["scores"], history, batch["seeds"], batch["parts"], batch["steps"]))
    )


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
    rows = zip(batch["scores"], batch["history"], batch["seeds"], batch["parts"], batch["steps"], strict=True)
    assert drawn == [reference(s.tolist(), h, int(a), int(b), int(c)) for s, h, a, b, c in rows]


def test_a_request_draws_the_same_token_in_any_batch():
    batch = requests(16)
    together = sample(batch)
    assert torch.equal(together[3:7], sample(batch, slice(3, 7)))
    assert torch.equal(together[9:10], sample(batch, slice(9, 10)))


def test_draws_follow_the_distribution():
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20000, 4).contiguous()
    sampler = RepetitionAwareSampler(top_p=0.85, top_k=25, win_size=2, tau_r=0.5)
    history = torch.full((20000, 2), NO_TOKEN)
    zeros = torch.zeros(20000, dtype=torch.long)
    counts = torch.bincount(sampler(scores, history, zeros + 5, zeros, torch.arange(20000)), minlength=4)
    expected = torch.tensor([4, 3, 2, 0]) / 9  # the id that crosses top_p is in, the next is not
    assert torch.allclose(counts / 20000, expected, atol=0.012)
    history[:, 1] = 0  # an output 0 must be drawn again, from all but 0
    counts = torch.bincount(sampler(scores, history, zeros + 5, zeros, torch.arange(20000)), minlength=4)
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
    on_gpu = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    history = torch.tensor([padded(h) for h in batch["history"]]).cuda()
    drawn = SAMPLER(on_gpu["scores"], history, on_gpu["seeds"], on_gpu["parts"], on_gpu["steps"])
    assert torch.equal(drawn.cpu(), sample(batch))


def test_sampler_settings_come_from_the_checkpoint():
    sampling = load_config(GOLDEN.checkpoint).llm.sampling
    assert (sampling.top_p, sampling.top_k, sampling.win_size, sampling.tau_r) == (0.8, 25, 10, 0.1)
