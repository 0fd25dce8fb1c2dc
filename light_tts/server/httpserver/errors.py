"""The error that ends a request instead of audio."""

from __future__ import annotations

_OUTCOMES = {413: "rejected", 499: "disconnected", 429: "busy", 503: "unavailable", 504: "timeout"}


class RequestError(Exception):
    """A request that gets no (more) audio. `status`: HTTP status; `message`: text for the client; `refusal`:
    label in the metrics if a valid request was not accepted; `field`: the request field it concerns, if any.
    """

    def __init__(
        self,
        status: int,
        message: str,
        retry_after: int | None = None,
        refusal: str | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after
        self.refusal = refusal
        self.field = field

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    @property
    def outcome(self) -> str:
        """Value of the `outcome` label in the metrics."""
        return _OUTCOMES.get(self.status, "rejected" if self.status < 500 else "failed")
