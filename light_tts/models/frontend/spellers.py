"""Numbers, dates, units and the like in words, by wetext: in this process, or in a few processes beside it.

wetext holds the GIL while it works, milliseconds for a sentence; in a process of its own it stops nobody.

    python -m light_tts.models.frontend.spellers PARENT

answers, on the socket that is its standard input, each line [language, text] by {"text"} or {"error"}.
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
START_SECONDS = 60.0  # for a process to load the grammars while every other process loads as well
ANSWER_SECONDS = 10.0  # for an answer; a long text gets more, by
CHARACTERS_PER_SECOND = 500  # several times slower than a core that has nothing else to do

logger = logging.getLogger(__name__)

Spell = Callable[[str], str]


class SpellError(Exception):
    """A text that wetext cannot spell, or nobody there to do it."""


def wetext_spellers() -> dict[str, Spell]:
    """One for each language, working in this process; none without the wetext package. Thread-safe."""
    try:
        from wetext import Normalizer
    except ImportError:
        return {}
    lock = threading.Lock()  # wetext does not promise to be thread-safe

    def speller(language: str) -> Spell:
        normalizer = Normalizer(lang=language, operator="tn", remove_erhua=False)

        def spell(text: str) -> str:
            with lock:
                return normalizer.normalize(text)

        return spell

    return {language: speller(language) for language in LANGUAGES}


class SpellerPool:
    """`spellers` that share so many processes; with none of them, those of this process. Thread-safe.

    The processes load in the background. They end with `close`, and with this process whatever ends it.
    """

    def __init__(self, processes: int) -> None:
        if importlib.util.find_spec("wetext") is None:
            processes = 0
        self.at_once = max(1, processes)  # texts that are spelled at the same time
        self._children = [_Child() for _ in range(processes)]
        # The one used last comes first: the caches of its core are warm.
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)
        self.spellers: dict[str, Spell] = (
            {language: partial(self._spell, language) for language in LANGUAGES}
            if processes
            else wetext_spellers()
        )

    def wait_until_ready(self) -> None:
        """Wait until every process has spelled something in each language. Raises SpellError or OSError."""
        for child in self._children:
            for language in LANGUAGES:
                child.spell(language, "1", START_SECONDS)

    def close(self) -> None:
        """End the processes; texts in work and later ones raise SpellError."""
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
    """One process that spells one text at a time; if it ends or does not answer, another takes its place."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._closed = False
        self._start()

    def spell(self, language: str, text: str, seconds: float) -> str:
        """Raises SpellError, also if no answer came within `seconds` and none from a new process either;
        OSError if no new process can be started."""
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
                        logger.warning("a process that spells texts is replaced: %r", error)
                        self._start()
            raise SpellError(f"no answer: {failure!r}")

    def close(self) -> None:
        self._closed = True
        self._process.kill()  # ends the wait for an answer
        with self._busy:
            self._end()

    def _ask(self, language: str, text: str, seconds: float) -> str:
        """Raises OSError if there is no answer in time, SpellError if it is an error."""
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
        self._socket, theirs = socket.socketpair()  # unlike a pipe it knows timeouts
        self._answers = self._socket.makefile("rb")
        with theirs:
            self._process = subprocess.Popen([sys.executable, "-m", __name__, str(os.getpid())], stdin=theirs)

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        self._socket.close()


def main() -> None:
    """Spell for the parent until it closes the socket or ends."""
    # The parent decides when we end; a signal to the whole group must not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The socket's end would be noticed only between two texts. What the kernel watches is the thread that
    # started us: if that ends before its process does, we are replaced at the next text.
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
