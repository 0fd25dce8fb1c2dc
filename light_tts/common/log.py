"""Logging for a multi-process server: every process writes to the console (stdout) and, if there is a log
directory, sends its formatted lines to the one process that writes the file.

Lines are sent as datagrams over a Unix socket, one per line, so lines of one process stay in order and never
mix.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import re
import socket
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

FILE_NAME = "light-tts.log"
MAX_BYTES = 50 * 2**20
BACKUPS = 10
MAX_LINE = 64 * 1024  # bytes; a datagram must fit in the socket's buffer
SEND_SECONDS = 1.0  # maximum time that a process waits for the writer

Format = Literal["text", "json"]
_REQUEST = re.compile(r"[0-9a-f]{16}(?= )")  # the request id at the beginning of a line


class _Formatter(logging.Formatter):
    default_msec_format = "%s.%03d"

    def __init__(self, process: str) -> None:
        name = process.replace("%", "%%")
        super().__init__(f"%(asctime)s %(levelname)s {name}[{os.getpid()}] %(message)s")


class _JsonFormatter(logging.Formatter):
    """Formats one JSON object per line with time, level, process, pid and message, `request` if the line
    starts with a request id, and the values of `extra={"fields": {...}}`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "process": self._process,
            "pid": os.getpid(),
            "message": message,
        }
        if request := _REQUEST.match(message):
            line["request"] = request[0]
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


_FORMATTERS = {"text": _Formatter, "json": _JsonFormatter}


class _SocketHandler(logging.Handler):
    """Sends each formatted record to the log writer; without a writer the line only appears on the
    console.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(SEND_SECONDS)

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendto(self.format(record).encode(errors="replace")[:MAX_LINE], self._path)

    def close(self) -> None:
        self._socket.close()
        super().close()


class _WriterHandler(logging.Handler):
    """Handler of the writer's own process, which writes directly."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        self._writer.write(self.format(record))


class LogWriter:
    """The only writer of `light-tts.log`; runs in the supervisor.

    `path`: where the socket is bound; `fileno()` is readable when `take()` has lines to write. Raises OSError
    if the directory cannot be written.
    """

    def __init__(self, path: Path, directory: str) -> None:
        os.makedirs(directory, exist_ok=True)
        self._file = logging.handlers.RotatingFileHandler(
            Path(directory) / FILE_NAME, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8"
        )
        self._file.setFormatter(logging.Formatter("%(message)s"))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))

    def fileno(self) -> int:
        return self._socket.fileno()

    def take(self) -> None:
        """Write all lines that have arrived."""
        while True:
            try:
                line = self._socket.recv(MAX_LINE)
            except BlockingIOError:
                return
            self.write(line.decode(errors="replace"))

    def write(self, line: str) -> None:
        self._file.handle(logging.makeLogRecord({"msg": line, "created": time.time()}))

    def close(self) -> None:
        self.take()
        self._socket.close()
        self._file.close()


def append(directory: str, process: str, level: str, message: str, format: Format = "text") -> None:
    """Append one line to the log file of a server that failed to start, if possible."""
    record = logging.LogRecord("light_tts", logging.getLevelName(level), "", 0, message, None, None)
    with contextlib.suppress(OSError):
        os.makedirs(directory, exist_ok=True)
        with open(Path(directory) / FILE_NAME, "a", encoding="utf-8") as file:
            file.write(_FORMATTERS[format](process).format(record) + "\n")


def setup(process: str, level: str, writer: Path | LogWriter | None = None, format: Format = "text") -> None:
    """Set up logging of this process under the name `process`, replacing an earlier setup, for example after
    a fork.

    `level`: debug, info, warning or error. `writer`: the log writer or its socket; None: console only.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if isinstance(writer, LogWriter):
        handlers.append(_WriterHandler(writer))
    elif writer is not None:
        handlers.append(_SocketHandler(writer))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    formatter = _FORMATTERS[format](process)
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(level.upper())
    logging.raiseExceptions = False  # a console that has disappeared must not stop a process
    for noisy in ("httpx", "httpcore", "asyncio", "multipart", "python_multipart", "urllib3"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
