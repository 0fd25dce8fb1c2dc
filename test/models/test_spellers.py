"""Text expanded by wetext in worker processes: the same result, and no process is left behind."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from support.processes import command_line
from support.waiting import eventually

from light_tts.common import process
from light_tts.models.frontend import spellers
from light_tts.models.frontend.spellers import SpellerPool, SpellError, wetext_spellers
from light_tts.models.frontend.text import TextNormalizer

MODULE = spellers.__name__
TEXTS = [
    "",
    " ",
    "Plain words.",
    "I paid $3.50 for 12 apples on 2024-01-02 at 10:30.",
    "二〇二四年的价格是￥3.5，共12个，电话13800138000。",
    "2024年1月2日，气温-5℃，增长了3/4。",
    "emoji 😀 and 👩‍👩‍👧 with 7 cats",
    "two\nlines\r\nand \u2028 more 1",
    'quotes " \\ and { "json": [1] }',
    "Ünïcödé ٣ ½ x² \x00 \x7f",
    "\ud800",  # no text at all: an error here and there
    ("Call 911 now, or pay 20% more. " * 200)[:5000],
    ("我有25个苹果。" * 700)[:5000],
]
LONG = "I paid $3.50 for 12 apples. " * 180  # takes a second
PARENT = f"""
import sys, threading, time
from {MODULE} import SpellerPool
pool = SpellerPool(2)
pool.wait_until_ready()
threading.Thread(target=pool.spellers["en"], args=(sys.argv[1],), daemon=True).start()
print("ready", flush=True)
time.sleep(60)
"""


def children(of: int | None = None) -> list[psutil.Process]:
    """Return the speller processes of process `of` (None: this one)."""
    return [child for child in psutil.Process(of).children() if MODULE in command_line(child)]


def work(processes: list[psutil.Process]) -> bool:
    """Wait until all processes are in the middle of a text; return whether they are."""

    def seconds() -> float:
        return sum(process.cpu_times().user for process in processes)

    before = seconds()
    return eventually(lambda: seconds() > before + 0.05, 10)


def outcome(spell: Callable[[str], str], text: str) -> str:
    try:
        return spell(text)
    except Exception:
        return "an error"


@pytest.fixture
def make_pool() -> Iterator[Callable[[int], SpellerPool]]:
    with contextlib.ExitStack() as cleanup:

        def make(processes: int) -> SpellerPool:
            pool = cleanup.enter_context(contextlib.closing(SpellerPool(processes)))
            pool.wait_until_ready()
            return pool

        yield make
    assert children() == []


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], str]:
    return {
        (language, text): outcome(spell, text)
        for language, spell in wetext_spellers().items()
        for text in TEXTS
    }


def test_processes_spell_as_this_one_does_for_many_threads_at_once(make_pool, expected):
    pool = make_pool(2)
    assert len(children()) == 2 and set(pool.spellers) == {"zh", "en"}

    def spell(case: tuple[str, str]) -> str:
        return outcome(pool.spellers[case[0]], case[1])

    cases = [case for case in expected if len(case[1]) < 1000] * 20 + list(expected)
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(spell, cases)) == [expected[case] for case in cases]
    assert expected["en", "\ud800"] == "an error"
    assert len(children()) == 2


def test_no_processes_means_this_process(make_pool, expected):
    pool = make_pool(0)
    assert children() == []
    case = ("en", TEXTS[3])
    assert pool.spellers["en"](case[1]) == expected[case]


def test_without_wetext_there_is_nothing_to_start(make_pool, monkeypatch):
    monkeypatch.setattr(spellers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "wetext", None)
    assert make_pool(2).spellers == {}


def test_a_process_loads_neither_torch_nor_numpy():
    code = f"import sys, wetext, {MODULE}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_idle_process_that_dies_is_replaced(make_pool, expected, caplog):
    pool = make_pool(1)
    (child,) = children()
    child.kill()
    assert pool.spellers["en"](TEXTS[3]) == expected["en", TEXTS[3]]
    assert "replacing a speller process" in caplog.text
    assert [other.pid for other in children()] != [child.pid]


def test_a_process_that_dies_in_its_work_is_replaced_and_the_text_spelled_after_all(make_pool):
    pool = make_pool(1)
    (child,) = children()
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(pool.spellers["en"], LONG)
        assert work([child])
        child.kill()
        assert answer.result(30) == wetext_spellers()["en"](LONG)


def test_a_process_that_hangs_is_replaced(make_pool, monkeypatch):
    pool = make_pool(1)
    (child,) = children()
    child.suspend()
    monkeypatch.setattr(spellers, "ANSWER_SECONDS", 2.0)
    begun = time.monotonic()
    assert pool.spellers["en"]("4 cats") == "four cats"
    assert time.monotonic() - begun > 1.9
    assert not psutil.pid_exists(child.pid)


def test_text_that_no_process_answers_is_left_as_it_is(make_pool, monkeypatch, caplog):
    pool = make_pool(1)
    monkeypatch.setattr(spellers, "ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(spellers, "CHARACTERS_PER_SECOND", 1e6)  # no process is so fast
    text = "我有25个苹果。" * 500
    assert TextNormalizer(len, pool.spellers).normalize(text) == text
    assert (
        caplog.text.count("replacing a speller process") == 2 and "text normalisation failed" in caplog.text
    )
    monkeypatch.undo()
    assert pool.spellers["en"]("4 cats") == "four cats"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_group_end_no_process(make_pool, number):
    pool = make_pool(1)
    (child,) = children()
    child.send_signal(number)
    assert pool.spellers["en"]("4 cats") == "four cats"
    assert children() == [child]


def test_close_ends_processes_and_those_who_wait_for_them(make_pool, caplog):
    pool = make_pool(1)
    (child,) = children()
    with ThreadPoolExecutor(4) as threads, caplog.at_level(logging.WARNING):
        answers = [threads.submit(pool.spellers["en"], LONG) for _ in range(4)]
        assert work([child])
        begun = time.monotonic()
        pool.close()
        assert [type(answer.exception(5)) for answer in answers] == [SpellError] * 4
        assert time.monotonic() - begun < 2
    assert children() == [] and not caplog.records
    with pytest.raises(SpellError):
        pool.spellers["en"]("late")


@pytest.mark.parametrize("text", ["short", LONG * 20])
def test_processes_end_with_a_parent_that_is_killed(text):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, text], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout.readline() == b"ready\n"
        started = children(parent.pid)
        assert len(started) == 2
        assert text == "short" or work(started)
        os.kill(parent.pid, signal.SIGKILL)
    # Their remains may wait for init.
    assert eventually(lambda: not any(process.start_time(child.pid) for child in started), 2)


def test_processes_hold_no_file_of_their_parent(make_pool):
    with open(__file__) as file:
        os.set_inheritable(file.fileno(), True)
        make_pool(2)
        assert all(not child.open_files() for child in children())
        assert all(child.num_fds() == 3 for child in children())


def test_a_thread_that_ends_takes_its_processes_along_but_no_text(make_pool):
    """The kernel ends a child with the thread that started it."""
    made = []
    starter = threading.Thread(target=lambda: made.append(make_pool(1)))
    starter.start()
    starter.join()
    assert made[0].spellers["en"]("4 cats") == "four cats"
