import math

import pytest
import torch

from light_tts.common import random
from light_tts.common.random import Purpose, gumbel, normal, stream_of, uniform

COUNTERS = torch.arange(1 << 18)


def test_values_never_change():
    """Golden values: a change here changes what every stored seed sounds like."""
    counters = torch.tensor([0, 1, 2, 1 << 20, (5 << 32) + 7])
    bits = random._bits(1234, stream_of(Purpose.NUCLEUS, 3), counters)
    assert bits.tolist() == [2599663993, 3615678095, 2884301192, 1549318297, 3401738842]
    assert uniform(0, 0, counters[:2]).tolist() == [0.39599305391311646, 0.5772842764854431]


def test_moments_are_those_of_the_distributions():
    n = len(COUNTERS)
    flat, bell, extreme = (draw(7, 1, COUNTERS).double() for draw in (uniform, normal, gumbel))
    assert abs(flat.mean() - 0.5) < 4 / math.sqrt(12 * n)
    assert abs(flat.var() - 1 / 12) < 1e-3
    assert abs(bell.mean()) < 4 / math.sqrt(n)
    assert abs(bell.var() - 1) < 0.02
    assert abs((bell**4).mean() - 3) < 0.1
    assert abs(extreme.mean() - 0.5772157) < 4 * 1.2825 / math.sqrt(n)
    assert abs(extreme.var() - math.pi**2 / 6) < 0.03


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_equally_frequent(shift):
    bits = random._bits(99, 5, COUNTERS)
    counts = torch.bincount((bits >> shift) & 255, minlength=256).double()
    expected = len(COUNTERS) / 256
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert 255 - 6 * math.sqrt(510) < chi2 < 255 + 6 * math.sqrt(510)


@pytest.mark.parametrize(
    "other", [(8, 1, 0), (7, 2, 0), (7 + (1 << 32), 1, 0), (7, 1 + (1 << 32), 0), (7, 1, 1), (7, 1, 1 << 32)]
)
def test_neighbouring_seeds_streams_and_counters_are_independent(other):
    seed, stream, offset = other
    a = normal(7, 1, COUNTERS)
    b = normal(seed, stream, COUNTERS + offset)
    assert abs(float((a * b).mean())) < 5 / math.sqrt(len(COUNTERS))
    assert not torch.equal(a, b)


def test_numbers_depend_on_nothing_but_seed_stream_and_counter():
    seeds, streams = torch.tensor([3, -4, 1 << 40]), torch.tensor([0, 1, stream_of(Purpose.SOURCE, 2)])
    batch = gumbel(seeds[:, None], streams[:, None], torch.arange(1000))
    for row, seed, stream in zip(batch, seeds.tolist(), streams.tolist(), strict=True):
        assert torch.equal(row, gumbel(seed, stream, torch.arange(1000)))
        assert torch.equal(row[501:777], gumbel(seed, stream, torch.arange(501, 777)))
        alone = gumbel(torch.tensor([[seed]]), torch.tensor([stream]), torch.arange(1000))
        assert alone.shape == (1, 1000) and torch.equal(alone[0], row)


def test_extreme_bits_give_finite_numbers(monkeypatch):
    monkeypatch.setattr(random, "_bits", lambda *_: torch.tensor([0, (1 << 32) - 1]))
    low, high = uniform(0, 0, COUNTERS[:2])
    assert low > 0 and high < 1
    assert torch.isfinite(gumbel(0, 0, COUNTERS[:2])).all()
    assert torch.isfinite(normal(0, 0, COUNTERS[:2])).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("draw", [uniform, gumbel, normal])
def test_a_gpu_draws_the_same_numbers(draw):
    assert torch.equal(draw(11, 4, COUNTERS), draw(11, 4, COUNTERS.cuda()).cpu())
