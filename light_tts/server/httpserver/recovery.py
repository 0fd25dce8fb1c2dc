"""Which requests a change among the stages concerns. Pure functions of the request and the stages known."""

from __future__ import annotations

from light_tts.server.core import messages
from light_tts.server.core.channel import Peers
from light_tts.server.httpserver.request import SpeechRequest

MAX_FRUITLESS_ATTEMPTS = 5


def lost_with(request: SpeechRequest, stage: str, index: int, incarnation: int, encodes: int) -> bool:
    """Does the death of this stage process take something of the request's present attempt with it?"""
    if not request.submitted or request.complete:
        return False
    if stage == "encode":
        return index == request.encode_index(encodes) and not _handed_on(request)
    if stage == "llm":
        return index == request.speech.style
    routed = request.routed
    return routed is not None and (routed.decode, routed.incarnation) == (index, incarnation)


def _handed_on(request: SpeechRequest) -> bool:
    """Has encode certainly handed everything on to the LLM? It has once the last part is being heard; text
    that is still arriving always passes through it."""
    return (
        not request.speech.bistream
        and len(request.parts) == request.part_count
        and request.routed is not None
    )


def routed_to_dead(routed: messages.Routed, peers: Peers) -> bool:
    """Was the job given to a decode process that this worker knows to be dead?"""
    known = peers.stages.get(("decode", routed.decode))
    return known is not None and (known.incarnation > routed.incarnation or known.state == "failed")


def hindrance(request: SpeechRequest, peers: Peers) -> str | None:
    """Why the request can never be served ("" if only because it must wait), or None if it can be now."""
    encodes, decodes = peers.of("encode"), peers.of("decode")
    if not encodes or not decodes or ("llm", request.speech.style) not in peers.stages:
        return ""
    needed = [encodes[request.encode_index(len(encodes))], peers.stages["llm", request.speech.style]]
    # Any decode process will do.
    needed.append(
        min(decodes, key=lambda info: ("up", "silent", "starting", "down", "failed").index(info.state))
    )
    for info in needed:
        if info.state == "failed":
            return f"{info.stage} {info.index} has been given up: {info.reason}"
    return None if all(info.state == "up" for info in needed) else ""
