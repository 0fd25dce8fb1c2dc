"""OpenTelemetry traces of requests (extra `otel`): the request, and the work of each stage on it. The SDK and
the exporter are imported only if --otlp_endpoint is set."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from light_tts.server.core.settings import Settings, SettingsError
from light_tts.server.httpserver.request import SpeechRequest

EXPORTER = "opentelemetry.exporter.otlp.proto.http"
FAILURES = ("failed", "unavailable", "timeout")  # outcomes
_PARENT = ("traceparent", "tracestate")  # headers

_headers: ContextVar[Mapping[str, str]] = ContextVar("trace_headers")


@dataclass(frozen=True)
class Period:
    """The work of a stage, which becomes a span. `begin`, `end`: monotonic seconds, which all processes of a
    machine share."""

    name: str
    begin: float
    end: float
    attributes: Mapping[str, Any]


def check_tracing(settings: Settings) -> None:
    """Raises SettingsError if --otlp_endpoint is set and cannot be used."""
    endpoint = settings.otlp_endpoint
    if not endpoint:
        return
    if not endpoint.startswith(("http://", "https://")):
        raise SettingsError(f"--otlp_endpoint {endpoint!r} must start with http:// or https://")
    try:
        found = importlib.util.find_spec(EXPORTER)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise SettingsError("--otlp_endpoint needs OpenTelemetry: pip install 'light-tts[otel]'")


class TraceParent:
    """ASGI middleware that keeps the trace headers of a request for the calls made in it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            headers = Headers(scope=scope)
            _headers.set({name: headers[name] for name in _PARENT if name in headers})
        await self._app(scope, receive, send)


def trace_headers() -> Mapping[str, str]:
    """Return the trace headers of the request that is being handled."""
    return _headers.get({})


class Tracing:
    """Sends spans to an OTLP/HTTP collector in a background thread. The standard variables of OpenTelemetry
    (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS and so on) apply."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": "light-tts"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("light_tts")
        self._epoch = time.time() - time.monotonic()

    def record(
        self,
        headers: Mapping[str, str],
        request_id: str,
        arrived: float,
        figures: Mapping[str, Any],
        request: SpeechRequest | None,
    ) -> None:
        """Send the span of a request that ends now, as a child of the span in `headers` if there is one, and
        the spans of its stages. `figures`: those of its log line; `request`: None if it was never
        submitted."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        attributes = {f"light_tts.{name}": value for name, value in figures.items() if name != "error"}
        root = self._tracer.start_span(
            figures["route"],
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            attributes={"light_tts.request_id": request_id, **attributes},
            start_time=self._nanoseconds(arrived),
        )
        inside = set_span_in_context(root)
        for period in () if request is None else stage_periods(request):
            begin, end = self._nanoseconds(period.begin), self._nanoseconds(period.end)
            span = self._tracer.start_span(
                period.name, inside, attributes=dict(period.attributes), start_time=begin
            )
            span.end(end)
        if figures["outcome"] in FAILURES:
            root.set_status(Status(StatusCode.ERROR, figures.get("error", figures["outcome"])))
        root.end()

    def close(self) -> None:
        """Send what is waiting, and end the thread."""
        self._provider.shutdown()

    def _nanoseconds(self, monotonic: float) -> int:
        return int((self._epoch + monotonic) * 1e9)


def stage_periods(request: SpeechRequest) -> Iterator[Period]:
    """Yield the work of the stages on a request, as far as its latest attempt has reported it."""
    if request.sent_at is not None and request.encoded_at is not None:
        tokens = {"light_tts.text_tokens": request.text_tokens}
        yield Period("encode", request.sent_at, request.encoded_at, tokens)
    for number, part in enumerate(request.parts):
        if len(part.clock) == 5:
            arrived, admitted, drawn, begun, ended = part.clock
            about = {"light_tts.part": number}
            waited = {"light_tts.queue_seconds": admitted - arrived, "light_tts.tokens": len(part.tokens)}
            yield Period("llm", arrived, drawn, {**about, **waited})
            yield Period("decode", begun, ended, {**about, "light_tts.samples": part.samples})
