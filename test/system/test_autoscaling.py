"""How many replicas a cluster of Ray shall run for the audio that they have in work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from light_tts.scale.autoscaling import METRIC, AudioInWork


@pytest.mark.parametrize(
    ("metrics", "replicas"),
    [
        ({METRIC: {"first": 90.0, "second": 30.0}}, 3.0),
        ({METRIC: {"first": 0.0}}, 0.0),
        ({METRIC: {}}, 2),
        ({}, 2),
        (None, 2),
    ],
    ids=["load", "none", "no replica says", "not measured", "nothing measured"],
)
def test_replicas_follow_the_audio_in_work(metrics, replicas):
    wanted, kept = AudioInWork(seconds=40)(SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=2))
    assert (wanted, kept) == (replicas, {})


def test_a_policy_without_seconds_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        AudioInWork(seconds=0)
