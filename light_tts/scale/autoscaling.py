"""How many replicas Ray Serve shall run: a policy for `autoscaling_config` in a `serve deploy` file."""

from __future__ import annotations

from typing import Any

METRIC = "light_tts_audio_seconds_in_work"  # of each replica, see docs/metrics.md


class AudioInWork:
    """So many replicas that each has about `seconds` of audio in work, over the `look_back_period_s` of
    Serve, which also applies its limits, factors and delays. No change while no replica says what it has."""

    def __init__(self, seconds: float) -> None:
        self._seconds = float(seconds)
        if not self._seconds > 0:
            raise ValueError("policy_kwargs of AudioInWork: seconds must be above 0")

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """`context`: Serve's AutoscalingContext. Returns the replicas wanted, and that nothing is kept."""
        of_each = (context.aggregated_metrics or {}).get(METRIC)
        if not of_each:
            return context.target_num_replicas, {}
        return sum(of_each.values()) / self._seconds, {}
