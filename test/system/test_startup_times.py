"""The durations of the phases of a start."""

from light_tts.server.core.startup_times import StartupTimes


def test_phases_are_measured_in_order_those_of_one_name_together_and_short_ones_left_out():
    now = [10.0]
    times = StartupTimes(lambda: now[0])
    for phase, seconds in (("imports", 0.5), ("GPU", 0.01), ("imports", 1.75), ("weights", 3.0)):
        now[0] += seconds
        times.end(phase)
    assert str(times) == "imports 2.2 s, weights 3.0 s"
