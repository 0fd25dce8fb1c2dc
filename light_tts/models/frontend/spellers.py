"""Expands numbers, dates, units and the like to words with wetext, in this process or in worker processes.

wetext holds the GIL for milliseconds per sentence; in a separate process it blocks nothing else.

    python -m light_tts.models.frontend.spellers PARENT

reads lines [language, text] from the socket that is its standard input, and answers each with {"text"} or
{"error"}.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial

from light_tts.common import process

LANGUAGES = ("zh", "en")
START_SECONDS = 60.0  # for a process to load the grammars while all other processes load as well
ANSWER_SECONDS = 10.0  # for an answer; longer texts get additional time according to
CHARACTERS_PER_SECOND = 500  # several times slower than an idle core

logger = logging.getLogger(__name__)

Spell = Callable[[str], str]


class SpellError(Exception):
    """wetext cannot expand the text, or no process is available."""


def wetext_spellers() -> dict[str, Spell]:
    """Return a speller per language that runs in this process; empty if the wetext package is missing.
    Thread-safe."""
    try:
        from wetext import Normalizer
    except ImportError:
        return {}
    lock = threading.Lock()  # wetext does not guarantee thread safety

    def speller(language: str) -> Spell:
        normalizer = Normalizer(lang=language, operator="tn", remove_erhua=False)

        def spell(text: str) -> str:
            with lock:
                return normalizer.normalize(text)

        return spell

    return {language: speller(language) for language in LANGUAGES}


class SpellerPool:
    """Provides `spellers` that run in a number of worker processes, or in this process if there are none.
    Thread-safe.

    The processes load in the background. They end with `close`, and with this process however it ends.
    """

    def __init__(self, processes: int) -> None:
        if importlib.util.find_spec("wetext") is None:
            processes = 0
        self.at_once = max(1, processes)  # number of texts processed concurrently
        self._children = [_Child() for _ in range(processes)]
        # Last in, first out: the process used last has warm caches.
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)
        self.spellers: dict[str, Spell] = (
            {language: partial(self._spell, language) for language in LANGUAGES}
            if processes
            else wetext_spellers()
        )

    def wait_until_ready(self) -> None:
        """Wait until every process has processed a text in each language. Raises SpellError or OSError."""
        for child in self._children:
            for language in LANGUAGES:
                child.spell(language, "1", START_SECONDS)

    def close(self) -> None:
        """Stop the processes; current and later texts raise SpellError."""
        for child in self._children:
            child.close()

    def _spell(self, language: str, text: str) -> str:
        """Raises SpellError or OSError."""
        child = self._idle.get()
        try:
            return child.spell(language, text, ANSWER_SECONDS + len(text) / CHARACTERS_PER_SECOND)
        finally:
            self._idle.put(child)


class _Child:
    """A worker process that handles one text at a time and is replaced if it ends or does not answer."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._closed = False
        self._start()

    def spell(self, language: str, text: str, seconds: float) -> str:
        """Return the expanded text. Raises SpellError, also if neither this process nor a new one answered
        within `seconds`; OSError if no new process can be started."""
        with self._busy:
            for _ in range(2):
                if self._closed:
                    raise SpellError("closed")
                try:
                    return self._ask(language, text, seconds)
                except OSError as error:
                    failure = error
                    self._end()
                    if not self._closed:
                        logger.warning("replacing a speller process: %r", error)
                        self._start()
            raise SpellError(f"no answer: {failure!r}")

    def close(self) -> None:
        self._closed = True
        self._process.kill()  # interrupts the wait for an answer
        with self._busy:
            self._end()

    def _ask(self, language: str, text: str, seconds: float) -> str:
        """Return the expanded text. Raises OSError if there is no answer in time, SpellError if the answer is
        an error."""
        self._socket.settimeout(seconds)
        self._socket.sendall(json.dumps([language, text]).encode() + b"\n")
        line = self._answers.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("it has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise SpellError(answer["error"])
        return answer["text"]

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()  # supports timeouts, unlike a pipe
        self._answers = self._socket.makefile("rb")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(os.getpid())], stdin=theirs.fileno()
            )

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        self._socket.close()


def main() -> None:
    """Serve the parent until it closes the socket or ends."""
    # The parent decides when we exit; a signal to the process group must not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A closed socket would only be noticed between two texts. The kernel watches the thread that started us;
    # if that ends before its process does, we are replaced at the next text.
    process.die_with_parent(int(sys.argv[1]))
    spellers = wetext_spellers()
    with open(0, "wb", closefd=False) as answers:
        for request in sys.stdin.buffer:
            language, text = json.loads(request)
            try:
                answer = {"text": spellers[language](text)}
            except Exception as error:
                answer = {"error": repr(error)}
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()


if __name__ == "__main__":
    main()
