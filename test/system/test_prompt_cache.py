import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from light_tts.common.prompt_features import PromptFeatures
from light_tts.server.core.prompt_cache import SharedSpeechCache, attach, write_segment


def features(value: int, tokens: int = 3) -> PromptFeatures:
    return PromptFeatures(
        np.full(tokens, value, np.int32),
        np.full((2 * tokens, 80), value, np.float32),
        np.full(192, value, np.float32),
    )


def key(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def make_cache(tmp_path, pool):
    return lambda capacity=2, owner=0: SharedSpeechCache(tmp_path, owner, capacity, pool)


def put(cache, number, job):
    """The finished entry of prompt `number`, pinned by `job`."""
    future, _ = cache.get_or_compute(key(number), job, lambda: features(number))
    return future.result(5)


def test_attached_features_are_those_that_were_computed(make_cache):
    got = attach(put(make_cache(), 7, "a/1").segment)
    assert got.speech_token.tolist() == [7] * 3 and got.speech_token.dtype == np.int32
    assert got.mel.shape == (6, 80) and (got.mel == 7).all()
    assert got.embedding.shape == (192,) and not got.embedding.flags.writeable


def test_a_voice_without_a_recording_can_be_kept(tmp_path):
    path = tmp_path / "x.prompt"
    write_segment(path, features(1, tokens=0))
    got = attach(path)
    assert got.speech_token.shape == (0,) and got.mel.shape == (0, 80) and got.embedding.shape == (192,)


def test_many_attached_entries_hold_no_file_open(make_cache):
    cache = make_cache(capacity=100)
    before = len(os.listdir("/proc/self/fd"))
    kept = [put(cache, number, f"job{number}") for number in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(entry.features.mel.flags.writeable is False for entry in kept)


def test_the_least_recently_used_entry_goes_first(make_cache):
    cache = make_cache(capacity=2)
    first, second = (put(cache, number, "a/1") for number in (1, 2))
    put(cache, 1, "a/1")
    put(cache, 3, "a/1")
    cache.release("a/1")
    attach(first.segment)
    with pytest.raises(FileNotFoundError):
        attach(second.segment)


def test_a_prompt_in_use_is_never_evicted(make_cache):
    cache = make_cache(capacity=1)
    entries = [put(cache, number, f"{number}/1") for number in range(4)]
    assert [attach(entry.segment).speech_token[0] for entry in entries] == [0, 1, 2, 3]
    for number in range(4):
        cache.release(f"{number}/1")
    assert len(cache) == 1 and cache.pinned() == 0


def test_an_attached_reader_outlives_the_eviction(make_cache):
    cache = make_cache(capacity=1)
    reader = attach(put(cache, 1, "a/1").segment)
    cache.release("a/1")
    put(cache, 2, "b/1")
    assert (reader.mel == 1).all()


def test_requests_at_the_same_time_compute_a_prompt_once(make_cache):
    cache, started, go, calls = make_cache(), threading.Event(), threading.Event(), []

    def compute():
        calls.append(1)
        started.set()
        assert go.wait(5)
        return features(1)

    futures = [cache.get_or_compute(key(1), f"{n}/1", compute) for n in range(5)]
    assert started.wait(5)
    go.set()
    assert len({future.result(5).segment for future, _ in futures}) == 1
    assert len(calls) == 1 and [known for _, known in futures] == [False] + [True] * 4


def test_abort_of_the_first_request_leaves_the_others_their_prompt(make_cache):
    cache, started, go = make_cache(), threading.Event(), threading.Event()

    def compute():
        started.set()
        assert go.wait(5)
        return features(1)

    cache.get_or_compute(key(1), "first/1", compute)
    assert started.wait(5)
    second, _ = cache.get_or_compute(key(1), "second/1", compute)
    cache.release("first/1")
    go.set()
    assert attach(second.result(5).segment).speech_token[0] == 1
    assert cache.pinned() == 1


def test_a_prompt_that_nobody_wants_any_more_is_not_computed(tmp_path):
    go, calls = threading.Event(), []
    with ThreadPoolExecutor(1) as one:
        cache = SharedSpeechCache(tmp_path, 0, 2, one)
        one.submit(go.wait, 5)
        cache.get_or_compute(key(1), "a/1", lambda: calls.append(1))
        cache.release("a/1")
        go.set()
    assert not calls and len(cache) == 0


def test_a_failure_reaches_all_that_wait_and_is_not_kept(make_cache):
    cache, go = make_cache(), threading.Event()

    def fail():
        assert go.wait(5)
        raise RuntimeError("broken model")

    futures = [cache.get_or_compute(key(1), f"{n}/1", fail)[0] for n in range(3)]
    go.set()
    for future in futures:
        with pytest.raises(RuntimeError, match="broken model"):
            future.result(5)
    assert cache.pinned() == 0
    assert put(cache, 1, "again/1").features.speech_token[0] == 1


def test_a_restarted_owner_adopts_complete_entries_and_removes_the_rest(make_cache, tmp_path):
    segment = put(make_cache(owner=1), 5, "a/1").segment
    (tmp_path / f"prompt-1-{key(6)}.partial").write_bytes(b"half")
    (tmp_path / f"prompt-1-{key(7)}.prompt").write_bytes(b"damaged")
    other = put(make_cache(owner=2), 8, "a/1").segment
    again = make_cache(owner=1)
    future, known = again.get_or_compute(key(5), "b/1", lambda: pytest.fail("computed again"))
    assert known and future.result(5).segment == segment
    assert sorted(str(path) for path in tmp_path.iterdir()) == sorted([segment, other])


def test_a_full_file_system_costs_old_entries_not_the_request(make_cache, monkeypatch):
    import errno

    from light_tts.server.core import prompt_cache

    cache, real = make_cache(capacity=10), prompt_cache.write_segment
    old = put(cache, 1, "a/1")
    cache.release("a/1")

    def write_while_there_is_room(path, features):
        if len(list(path.parent.glob("*.prompt"))) >= 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, features)

    monkeypatch.setattr(prompt_cache, "write_segment", write_while_there_is_room)
    assert attach(put(cache, 2, "b/1").segment).speech_token[0] == 2
    with pytest.raises(FileNotFoundError):
        attach(old.segment)


@pytest.mark.parametrize("bad", ["", "../x", "UPPER", "g"])
def test_keys_that_are_no_hashes_are_refused(make_cache, bad):
    with pytest.raises(ValueError, match="hash"):
        make_cache().get_or_compute(bad, "a/1", lambda: features(1))
