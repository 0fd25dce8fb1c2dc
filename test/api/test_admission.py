"""Admission decisions derived from measurements; no sockets, simulated clock."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from light_tts.server.core.counters import ActiveRequests, ServiceRate
from light_tts.server.core.messages import SpeechOptions
from light_tts.server.core.settings import Settings
from light_tts.server.httpserver.admission import (
    ALWAYS,
    LEAST_AUDIO,
    SECONDS_OF_A_PART,
    Admission,
    AdmittedRequest,
    expected_audio,
)
from light_tts.server.httpserver.errors import RequestError

AUDIO = 4.0  # seconds of audio per request
DEADLINE = 300.0


class Workers:
    """HTTP workers with one admission each, and a server that produces `speed` seconds of audio per second,
    one request at a time."""

    def __init__(self, directory: Path, speed: float = 2.0, workers: int = 2, **settings: object) -> None:
        self.now, self.speed = 0.0, speed
        self.free_at = 0.0
        self.in_work: list[tuple[float, Admission, AdmittedRequest]] = []
        self.active = ActiveRequests(directory)
        self.rate = ServiceRate(directory)
        self.admissions = [
            Admission(Settings(**settings), ActiveRequests(directory), ServiceRate(directory), n, self.clock)
            for n in range(workers)
        ]

    def clock(self) -> float:
        return self.now

    def arrive(
        self, number: int, remaining: float = DEADLINE, audio: float = AUDIO, stream: bool = False
    ) -> float:
        """Send a request to worker `number` modulo their number; return the seconds until it is served."""
        admission = self.admissions[number % len(self.admissions)]
        admitted = admission.admit(audio, remaining, stream)
        self.free_at = max(self.free_at, self.now) + audio / self.speed
        self.in_work.append((self.free_at, admission, admitted))
        return self.free_at - self.now

    def until(self, now: float) -> None:
        """Advance the clock; finish requests."""
        while self.in_work and self.in_work[0][0] <= now:
            self.now, admission, admitted = self.in_work.pop(0)
            admission.done(admitted, measure=True)
            admission.leave(admitted)
        self.now = now

    def closed_loop(self, clients: int, rounds: int = 5) -> None:
        for _ in range(rounds):
            for number in range(clients):
                self.arrive(number)
            self.until(self.free_at)


@pytest.fixture
def workers(tmp_path) -> Workers:
    return Workers(tmp_path)


def refusal(workers: Workers, *args: float) -> RequestError:
    with pytest.raises(RequestError) as caught:
        workers.arrive(*args)
    assert caught.value.status == 429
    assert caught.value.retry_after >= 1
    return caught.value


def test_before_anything_is_measured_all_are_accepted(workers):
    for number in range(200):
        workers.arrive(number)
    assert workers.active.work() == 200 * AUDIO * 1000


def test_at_ten_times_the_capacity_those_accepted_wait_no_longer_than_max_wait(tmp_path):
    workers = Workers(tmp_path, speed=20.0)
    workers.closed_loop(16)
    seconds, refused = [], 0
    for number in range(50 * 60):
        workers.until(workers.now + 0.02)
        try:
            seconds.append(workers.arrive(number))
        except RequestError as error:
            assert error.refusal == "wait"
            refused += 1
    assert max(seconds) < 3.5  # --max_wait and its own time
    assert sum(seconds[len(seconds) // 2 :]) / (len(seconds) // 2 + 1) > 2  # and there is always work
    assert refused > 2000
    workers.until(workers.free_at)
    assert workers.arrive(0) < 1
    assert workers.active.total() == 1


def test_few_are_accepted_on_the_slowest_machine(tmp_path):
    workers = Workers(tmp_path, speed=0.5)
    workers.closed_loop(ALWAYS)
    for number in range(ALWAYS):
        workers.arrive(number)
    assert refusal(workers, 0).refusal == "wait"


def test_what_cannot_meet_its_deadline_is_refused(workers):
    workers.closed_loop(8)
    for number in range(8):
        workers.arrive(number)
    assert workers.active.total() == 8
    error = refusal(workers, 0, 10.0)
    assert error.refusal == "deadline"
    assert workers.active.total() == 8
    workers.arrive(0, 60.0)


def test_long_texts_do_not_keep_short_ones_out(workers):
    workers.closed_loop(16)
    for number in range(10):
        workers.arrive(number, audio=200.0)
    workers.arrive(0, audio=2.0)
    assert refusal(workers, 0, DEADLINE, 800.0).refusal == "deadline"


def test_one_alone_is_accepted_whatever_was_measured(workers):
    workers.rate.observe(1, AUDIO, 1000.0)
    workers.arrive(0)
    workers.arrive(1)
    assert refusal(workers, 2).refusal == "deadline"


def test_the_limit_of_requests_in_work(tmp_path):
    workers = Workers(tmp_path, max_pending_requests=3)
    for number in range(3):
        workers.arrive(number)
    assert refusal(workers, 0).refusal == "pending"


def test_a_fast_machine_is_not_judged_by_what_it_does_for_one(tmp_path):
    rate = ServiceRate(tmp_path)
    rate.observe(1, AUDIO, 1.0)
    assert rate.predict(64, 64 * AUDIO) == pytest.approx(1.0)  # extrapolated
    for _ in range(100):
        rate.observe(64, 64 * AUDIO, 3.0)
    assert rate.predict(64, 64 * AUDIO) == pytest.approx(3.0)
    assert rate.predict(1, AUDIO) == pytest.approx(1.0)


def test_where_more_at_a_time_brought_little_it_is_hoped_to_double_once(tmp_path):
    rate = ServiceRate(tmp_path)
    rate.observe(1, AUDIO, 1.0)
    rate.observe(2, 2 * AUDIO, 2.0)
    assert rate.predict(64, 64 * AUDIO) == pytest.approx(32.0)
    rate.observe(64, 64 * AUDIO, 64.0)
    assert rate.predict(64, 64 * AUDIO) == pytest.approx(64.0)


def test_as_many_streams_are_accepted_as_the_server_keeps_up_with(tmp_path):
    """It makes 30 seconds of audio a second, so 30 streams can be played at a time, of whatever length. More
    are accepted only if all are made within --max_wait."""
    for audio, accepted in ((2.0, 37), (4.0, 30), (16.0, 30)):
        directory = tmp_path / str(audio)
        directory.mkdir()
        workers = Workers(directory, speed=30.0, max_wait=2.5)
        workers.rate.observe(1, audio, audio / 30)
        workers.rate.observe(32, 32 * audio, 32 * audio / 30)
        count = 0
        with pytest.raises(RequestError) as caught:
            while True:
                workers.arrive(0, audio=audio, stream=True)
                count += 1
        assert caught.value.refusal == "wait"
        assert abs(count - accepted) <= 1
        with pytest.raises(RequestError):
            workers.arrive(0, audio=audio)


def test_a_gpu_just_started_is_not_judged_by_its_first_answers(tmp_path):
    """Figures of one H200: eight streams of 5 s at a time, slowly because of new kernels, then 64."""
    workers = Workers(tmp_path, speed=256.0)
    for count in range(1, 9):
        workers.rate.observe(count, 5.0 * count, 0.59)
    for number in range(64):
        workers.arrive(number, audio=5.0, stream=True)


def test_a_bad_moment_is_forgotten_when_few_are_served_well(tmp_path):
    rate = ServiceRate(tmp_path)
    for _ in range(20):
        rate.observe(64, 64 * AUDIO, 100.0)
    assert rate.predict(64, 64 * AUDIO) == pytest.approx(100.0)
    rate.observe(8, 8 * AUDIO, 1.0)
    assert rate.predict(64, 64 * AUDIO) == pytest.approx(8.0)


def test_work_ends_before_the_client_has_read_all(workers):
    admission = workers.admissions[0]
    admitted = admission.admit(AUDIO, DEADLINE, stream=False)
    admission.done(admitted, measure=False)
    assert (workers.active.total(), workers.active.work()) == (1, 0)
    admission.leave(admitted)
    assert (workers.active.total(), workers.active.work()) == (0, 0)


def test_the_audio_in_work_is_a_metric(workers):
    def shown() -> float:
        return REGISTRY.get_sample_value("light_tts_audio_seconds_in_work")

    before = shown()
    workers.arrive(0)
    workers.arrive(1, audio=SECONDS_OF_A_PART * 10)
    assert shown() - before == pytest.approx(AUDIO + SECONDS_OF_A_PART)
    workers.until(workers.free_at)
    assert shown() == pytest.approx(before)


def test_the_audio_expected_of_a_text():
    options = SpeechOptions(seed=0)
    assert expected_audio("x" * 150, options) == pytest.approx(10)
    assert expected_audio("你" * 45, options) == pytest.approx(10)
    assert expected_audio("Hi.", options) == LEAST_AUDIO
    assert expected_audio("x" * 150, SpeechOptions(seed=0, max_new_tokens=75)) == 3
    assert expected_audio("x" * 15, SpeechOptions(seed=0, min_new_tokens=500)) == 20
    assert expected_audio("x" * 600, SpeechOptions(seed=0, max_new_tokens=75)) == 6  # two parts
    assert expected_audio("", options) == 10
