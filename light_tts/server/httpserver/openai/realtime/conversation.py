"""The items of a session, as represented in the Realtime API."""

from __future__ import annotations

import uuid
from typing import Any

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.openai.realtime.fields import Item

MAX_ITEMS = 128


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:24]}"


def as_object(item: Item) -> dict[str, Any]:
    """Return the item as JSON object, with a generated id if the client gave none."""
    return {
        "id": item.id or new_id("item"),
        "object": "realtime.item",
        "type": "message",
        "status": "completed",
        "role": item.role,
        "content": [{"type": part.type, "text": part.text} for part in item.content],
    }


def text_of(item: dict[str, Any]) -> str:
    """Return the text a client submitted to be spoken; empty for system messages and for items spoken
    here.
    """
    if item["role"] == "system":
        return ""
    return " ".join(part.get("text", "") for part in item["content"]).strip()


class Conversation:
    """The items of a conversation, at most MAX_ITEMS; the oldest is dropped first."""

    def __init__(self) -> None:
        self.id = new_id("conv")
        self._items: dict[str, dict[str, Any]] = {}

    def add(self, item: dict[str, Any]) -> str | None:
        """Add an item; return the id of the one before it. Raises RequestError (400)."""
        if item["id"] in self._items:
            raise RequestError(400, f"there is an item {item['id']!r} already", field="item.id")
        before = next(reversed(self._items), None)
        self._items[item["id"]] = item
        if len(self._items) > MAX_ITEMS:
            del self._items[next(iter(self._items))]
        return before

    def get(self, name: object) -> dict[str, Any]:
        """Return an item. Raises RequestError (404)."""
        item = self._items.get(name) if isinstance(name, str) else None
        if item is None:
            raise RequestError(404, f"there is no item {str(name)[:64]!r}", field="item_id")
        return item

    def delete(self, name: object) -> str:
        """Delete an item; return its id. Raises RequestError (404)."""
        item = self.get(name)
        del self._items[item["id"]]
        return str(item["id"])

    @property
    def last_text(self) -> str:
        """Return the text of the latest item that has one."""
        return next((text for item in reversed(self._items.values()) if (text := text_of(item))), "")
