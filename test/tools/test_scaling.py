"""The simulation of docs/scaling.md."""

from __future__ import annotations

import pytest

from scripts import scaling


def test_a_server_gives_the_rate_that_was_measured():
    server = scaling.Server()
    for _ in range(32):
        server.add()
    server.advance(0.01)
    assert server.done * 32 == pytest.approx(0.01 * 44.6)
    server.advance(10.0)
    assert not server.ends


def test_choosing_the_less_busy_of_two_is_better_than_chance():
    by_chance, by_load = (
        scaling.percentile_95(policy, count=10, load=40.0, seconds=6.0)
        for policy in ("random", "less busy of two")
    )
    assert by_load < by_chance


def test_more_load_makes_a_server_slower():
    light, heavy = (scaling.percentile_95("in turn", 1, load, seconds=20.0) for load in (5.0, 60.0))
    assert light < scaling.GOAL < heavy
