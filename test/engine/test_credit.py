"""Work is held back for a bounded time, which is regained slowly."""

from light_tts.engine.llm.credit import Credit


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_work_is_held_back_for_a_bounded_time_that_is_regained():
    clock = Clock()
    credit = Credit(longest=0.1, regained=0.25, clock=clock)
    held = 0.0
    for _ in range(10_000):  # ten seconds
        clock.now += 0.001
        held += 0.001 * credit.holds(True)
    assert abs(held - (0.1 + (10 - held) * 0.25)) < 0.01  # a fifth of the time
    clock.now = 1000.0
    assert not credit.holds(False)
    answers = []
    for clock.now in (1000.2, 1000.25, 1000.29, 1000.31):
        answers.append(credit.holds(True))
    assert answers == [True, True, True, False]
