"""Speaks the utterances of one conversation in order. An utterance is a complete text, or text that is spoken
while it arrives."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

import msgspec

from light_tts.server.core.messages import Prompt, SpeechOptions
from light_tts.server.httpserver.arrival import Arrival, closed_on_error
from light_tts.server.httpserver.call import SpeechCall
from light_tts.server.httpserver.captions import Word
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import check_text, random_seed
from light_tts.server.httpserver.live_words import LiveWords
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.request import WantedSpeech
from light_tts.server.httpserver.sound import SoundOut, SoundWishes


@dataclass(frozen=True)
class UtteranceSettings:
    """Voice, options and format of the next utterances. `seeded`: the client chose the seed; otherwise each
    utterance gets its own."""

    style: int
    prompt: Prompt
    options: SpeechOptions
    seeded: bool
    wishes: SoundWishes


class Cancelled(RequestError):
    """The client cancelled the utterance."""

    def __init__(self) -> None:
        super().__init__(499, "cancelled by the client")


class Utterance:
    """The text between two flushes. This base class is an utterance with nothing to speak."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.begun = False  # some of its audio has been sent


class SpokenUtterance(Utterance):
    """A complete text, or text between two flushes. `words`: None if word times were not requested."""

    def __init__(self, index: int, call: SpeechCall, sound: SoundOut, words: LiveWords | None) -> None:
        super().__init__(index)
        self.words = words
        self.call = call
        self.sound = sound
        self.text = ""


class UtteranceReceiver(Protocol):
    """Receives the events of the utterances in order, one utterance after the other."""

    async def on_begin(self, utterance: SpokenUtterance) -> None:
        """The utterance's first audio follows."""

    async def on_audio(self, utterance: SpokenUtterance, audio: bytes, words: list[Word]) -> None:
        """The next audio, and the words whose times are now known, if they were requested."""

    async def on_end(self, utterance: Utterance, error: RequestError | None) -> None: ...


class Live:
    """Text-to-speech of one conversation. `append` and `flush`, or `say`, add text; `run` speaks it. After
    `close`, `run` returns once the pending text has been spoken; `abandon` frees everything at once."""

    def __init__(
        self, manager: HttpServerManager, route: str, settings: UtteranceSettings, receiver: UtteranceReceiver
    ) -> None:
        self.settings = settings  # for the next utterance
        self._manager = manager
        self._route = route
        self._receiver = receiver
        self._queue: asyncio.Queue[Utterance | None] = asyncio.Queue()
        self._calls: set[SpeechCall] = set()
        self._current: SpokenUtterance | None = None
        self._count = 0

    @property
    def open(self) -> bool:
        """Whether there is unflushed text."""
        return self._current is not None

    @property
    def busy(self) -> bool:
        """Whether an utterance is being spoken or waiting."""
        return bool(self._calls)

    def append(self, text: str) -> None:
        """Add text to the current utterance. Raises RequestError and changes nothing if the text is
        invalid.
        """
        said = self._current.text if self._current is not None else ""
        limit = self._manager.settings.max_text_length - len(said)
        check_text("text", text, limit, may_be_empty=True)
        if self._current is None:
            if not text.strip():
                return
            self._current = self._begin(self.settings)
        self._current.text += text
        if text:
            self._current.call.append_text(text)

    def flush(self) -> None:
        """Complete the current utterance, even an empty one."""
        if self._current is None:
            self._put(Utterance(self._count))
        else:
            self._current.call.finish_text()
            self._current = None
        self._count += 1

    def say(self, text: str, settings: UtteranceSettings) -> SpokenUtterance:
        """Add an utterance with a complete text. Raises RequestError and changes nothing if it is invalid."""
        check_text("text", text, self._manager.settings.max_text_length)
        utterance = self._begin(settings, text)
        self._count += 1
        return utterance

    def cancel(self, utterance: SpokenUtterance) -> None:
        """End the utterance with Cancelled, unless it has already ended."""
        if utterance.call in self._calls:
            utterance.call.give_up(Cancelled())

    def close(self) -> None:
        """Flush; no more text will follow."""
        if self._current is not None:
            self.flush()
        self._put(None)

    def abandon(self) -> None:
        """Drop all utterances because the client is gone. May be called twice."""
        for call in list(self._calls):
            call.close("disconnected")
        self._calls.clear()

    async def run(self) -> None:
        """Speak utterances until `close`."""
        while (utterance := await self._queue.get()) is not None:
            if isinstance(utterance, SpokenUtterance):
                await self._speak(utterance)
            else:
                await self._receiver.on_end(utterance, None)

    def _begin(self, settings: UtteranceSettings, text: str = "") -> SpokenUtterance:
        """`text` empty: it comes piece by piece."""
        options = settings.options
        if not settings.seeded:
            options = msgspec.structs.replace(options, seed=random_seed())
        arrival = Arrival(self._manager, self._route)
        with closed_on_error(arrival):
            sound = SoundOut(settings.wishes, self._manager.sample_rate)
            arrival.admit(options, text, stream=True)
            speech = WantedSpeech(
                settings.style, settings.prompt, options, text=text, stream=True, bistream=not text
            )
            call = SpeechCall(arrival, speech)
        self._calls.add(call)
        words = LiveWords(call, settings.wishes.speed) if options.word_times else None
        utterance = SpokenUtterance(self._count, call, sound, words)
        utterance.text = text
        self._put(utterance)
        return utterance

    def _put(self, utterance: Utterance | None) -> None:
        self._queue.put_nowait(utterance)

    async def _speak(self, utterance: SpokenUtterance) -> None:
        call, sound, words = utterance.call, utterance.sound, utterance.words
        try:
            async for pcm in call:
                data = await asyncio.to_thread(sound.push, pcm)
                call.note_sent(pcm)
                known = [] if words is None else await asyncio.to_thread(words.hear, pcm)
                await self._send(utterance, data, known)
            known = [] if words is None else await asyncio.to_thread(words.finish)
            await self._send(utterance, await asyncio.to_thread(sound.finish), known)
            call.close()
            await self._receiver.on_end(utterance, None)
        except RequestError as error:
            call.refuse(error)
            if self._current is utterance:  # more text may come, but it will not be spoken
                self._current = None
                self._count += 1
            await self._receiver.on_end(utterance, error)
        finally:
            call.close("disconnected")
            self._calls.discard(call)

    async def _send(self, utterance: SpokenUtterance, data: bytes, words: list[Word]) -> None:
        if not data and not words:
            return
        if not utterance.begun:
            utterance.begun = True
            await self._receiver.on_begin(utterance)
        await self._receiver.on_audio(utterance, data, words)
