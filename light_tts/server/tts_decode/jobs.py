"""Jobs of the decode stage. Each is a queue of parts whose first one is spoken chunk by chunk, so that the
client receives audio in order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from light_tts.engine.speech.part_speech import PartSpeech
from light_tts.engine.speech.work_item import SpeechState, WorkItem


@dataclass
class SpokenPart:
    """One part of a job. `opened`: when the language model began with it; `since`: when its current chunk
    became ready, earlier parts being finished; `times`: its word times; `begun`: when its first chunk went to
    the engine; `clock`: see SpeechTokens."""

    number: int
    parts: int
    speech: PartSpeech
    state: SpeechState
    opened: float
    since: float = 0.0
    times: list[int] = field(default_factory=list)
    begun: float = 0.0
    clock: list[float] = field(default_factory=list)


@dataclass
class DecodeJob:
    """A job. `parts`: unfinished parts in order. `busy`: a chunk of the first part is in the engine. `alone`:
    no other job may be in the engine at the same time."""

    name: str
    reply_to: str
    alone: bool = False
    parts: deque[SpokenPart] = field(default_factory=deque)
    busy: bool = False


def has_chunk(job: DecodeJob) -> bool:
    """Return whether a chunk of the job is waiting or in progress."""
    return bool(job.parts) and job.parts[0].speech.step is not None


def work_item(part: SpokenPart) -> WorkItem:
    """Return the engine's input for the part's current chunk, which must exist (see `has_chunk`)."""
    speech = part.speech
    assert speech.step is not None
    return WorkItem(part.state, speech.ids, speech.step.chunk, speech.stream)
