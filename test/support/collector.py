"""A collector of OpenTelemetry: takes traces over HTTP and keeps their spans."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from support.http_thread import serving


class Collector(ThreadingHTTPServer):
    spans: list[Any]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def trace(self, trace_id: str, count: int, timeout: float = 20.0) -> dict[str, Any]:
        """The spans of a trace by their names, once there are `count` of them."""
        end = time.monotonic() + timeout
        while True:
            found = {span.name: span for span in self.spans if span.trace_id.hex() == trace_id}
            if len(found) >= count or time.monotonic() > end:
                return found
            time.sleep(0.05)


class _Traces(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    server = Collector(("127.0.0.1", 0), _Traces)
    server.spans = []
    with serving(server):
        yield server
