"""Decides which requests are affected by a change of the stages. Pure functions of the request and the known
stages."""

from __future__ import annotations

from light_tts.server.core import messages
from light_tts.server.core.channel import Peers
from light_tts.server.httpserver.request import SpeechRequest

MAX_FRUITLESS_ATTEMPTS = 5


def lost_with(request: SpeechRequest, stage: str, index: int, incarnation: int, encodes: int) -> bool:
    """Return whether the death of this stage process loses part of the request's current attempt."""
    if not request.submitted or request.complete:
        return False
    if stage == "encode":
        return index == request.encode_index(encodes) and not _handed_on(request)
    if stage == "llm":
        return index == request.speech.style
    routed = request.routed
    return routed is not None and (routed.decode, routed.incarnation) == (index, incarnation)


def _handed_on(request: SpeechRequest) -> bool:
    """Return whether encode has certainly passed everything to the LLM: audio of the last part has arrived,
    and no more text is expected."""
    return (
        not request.speech.bistream
        and len(request.parts) == request.part_count
        and request.routed is not None
    )


def routed_to_dead(routed: messages.Routed, peers: Peers) -> bool:
    """Return whether the job was assigned to a decode process known to be dead."""
    known = peers.stages.get(("decode", routed.decode))
    return known is not None and (known.incarnation > routed.incarnation or known.state == "failed")


def blocking_reason(request: SpeechRequest, peers: Peers) -> str | None:
    """Return None if the request can be served now, "" if it must wait, or the reason why it can never be
    served."""
    encodes, decodes = peers.of("encode"), peers.of("decode")
    if not encodes or not decodes or ("llm", request.speech.style) not in peers.stages:
        return ""
    needed = [encodes[request.encode_index(len(encodes))], peers.stages["llm", request.speech.style]]
    # Any decode process will do, so the best state counts.
    needed.append(
        min(decodes, key=lambda info: ("up", "silent", "starting", "down", "failed").index(info.state))
    )
    for info in needed:
        if info.state == "failed":
            return f"{info.stage} {info.index} has been given up: {info.reason}"
    return None if all(info.state == "up" for info in needed) else ""
