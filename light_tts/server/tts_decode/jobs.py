"""Jobs of the decode stage: queues of parts, of which the first is spoken, one chunk at a time, so what
reaches the client is always in order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from light_tts.engine.speech.part_speech import PartSpeech
from light_tts.engine.speech.token2wav import SpeechState, WorkItem


@dataclass
class Part:
    """One part of a job. `since`: when its present chunk could be spoken, the parts before it being over;
    `times`: of its words."""

    number: int
    parts: int
    speech: PartSpeech
    state: SpeechState
    since: float = 0.0
    times: list[int] = field(default_factory=list)


@dataclass
class DecodeJob:
    """`parts`: not yet spoken to their end, in order. `busy`: a chunk of the first one is in the engine.
    `alone`: nothing else may be in it meanwhile."""

    name: str
    reply_to: str
    alone: bool = False
    parts: deque[Part] = field(default_factory=deque)
    busy: bool = False


def has_chunk(job: DecodeJob) -> bool:
    """Whether a chunk of the job waits or is in work."""
    return bool(job.parts) and job.parts[0].speech.step is not None


def work_item(part: Part) -> WorkItem:
    """What the engine is given of the part's present chunk, which must be there (see `has_chunk`)."""
    speech = part.speech
    assert speech.step is not None
    return WorkItem(part.state, speech.ids, speech.step.chunk, speech.stream)
