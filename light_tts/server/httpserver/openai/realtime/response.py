"""One response: the request and its current representation."""

from __future__ import annotations

from typing import Any

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.live import Cancelled, SpokenUtterance
from light_tts.server.httpserver.openai.errors import error_body
from light_tts.server.httpserver.openai.realtime.conversation import new_id
from light_tts.server.httpserver.openai.realtime.fields import SessionFields


class Response:
    """`utterance` speaks it according to `fields`; `conversation`: id of the conversation it is added to, or
    None."""

    def __init__(
        self,
        utterance: SpokenUtterance,
        fields: SessionFields,
        conversation: str | None,
        metadata: dict[str, str] | None,
    ) -> None:
        self.id = new_id("resp")
        self.utterance = utterance
        self.conversation = conversation
        self.item: dict[str, Any] = {
            "id": new_id("item"),
            "object": "realtime.item",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self._fields = fields
        self._metadata = metadata

    @property
    def in_output(self) -> dict[str, Any]:
        """Position of its audio, for events."""
        return {"response_id": self.id, "item_id": self.item["id"], "output_index": 0, "content_index": 0}

    def finish_item(self, error: RequestError | None) -> None:
        """Finish the item with what has been spoken so far."""
        self.item["status"] = "completed" if error is None else "incomplete"
        self.item["content"] = [{"type": "output_audio", "transcript": self.utterance.text}]

    def begun(self) -> dict[str, Any]:
        return self._object("in_progress", None, [], None)

    def ended(self, error: RequestError | None) -> dict[str, Any]:
        usage: dict[str, Any] = dict(self.utterance.call.request.usage)
        usage["input_token_details"] = {
            "text_tokens": usage["input_tokens"],
            "audio_tokens": 0,
            "cached_tokens": 0,
        }
        usage["output_token_details"] = {"text_tokens": 0, "audio_tokens": usage["output_tokens"]}
        output = [self.item] if self.utterance.begun else []
        if error is None:
            return self._object("completed", None, output, usage)
        if isinstance(error, Cancelled):
            details = {"type": "cancelled", "reason": "client_cancelled"}
            return self._object("cancelled", details, output, usage)
        return self._object("failed", {"type": "failed", **error_body(error)}, output, usage)

    def _object(
        self,
        status: str,
        details: dict[str, Any] | None,
        output: list[dict[str, Any]],
        usage: dict[str, Any] | None,
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": output,
            "conversation_id": self.conversation,
            "output_modalities": ["audio"],
            "audio": self._fields.view(),
            "max_output_tokens": "inf",
            "metadata": self._metadata,
            "usage": usage,
        }
