"""A dead HTTP worker is remembered while its messages may still be in flight."""

from light_tts.server.core.gone_workers import REMEMBERED_SECONDS, GoneWorkers


def test_a_dead_worker_is_remembered_for_a_while_and_then_its_address_may_be_anothers():
    now = 100.0
    gone = GoneWorkers(lambda: now)
    gone.add("tcp://127.0.0.1:5000")
    now += REMEMBERED_SECONDS / 2
    gone.add("tcp://127.0.0.1:5001")
    assert "tcp://127.0.0.1:5000" in gone and "tcp://127.0.0.1:5001" in gone
    assert "tcp://127.0.0.1:5002" not in gone
    now += REMEMBERED_SECONDS / 2
    assert "tcp://127.0.0.1:5000" not in gone and "tcp://127.0.0.1:5001" in gone
