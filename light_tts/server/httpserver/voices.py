"""Named voices: one file each in `--spk_dir`, written atomically, so that every worker sees a new voice at
once and never a partial one."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

import msgspec

from light_tts.server.httpserver.errors import RequestError

SUFFIX = ".voice"
# Also safe as a file name: begins with a letter, digit or underscore of any script and contains no path
# separators.
_SAFE_ID = re.compile(r"\w[\w.\-]{0,47}")


Stamp = tuple[int, int, int]  # identifies the content of a voice's file


class StoredVoice(msgspec.Struct, frozen=True):
    """A stored voice. `recording`: the sound file as uploaded; `aligned`: use it in whole chunks."""

    prompt_text: str
    recording: bytes
    aligned: bool = False


def check_id(spk_id: str) -> str:
    """Return a valid `spk_id`. Raises RequestError (400)."""
    if not _SAFE_ID.fullmatch(spk_id):
        raise RequestError(
            400, "spk_id must have 1 to 48 letters, digits, '_', '-' or '.', and begin with a letter or digit"
        )
    return spk_id


class VoiceStore:
    """The voices on disk. All methods except `stamp` and `has` do blocking file I/O; call them in a
    thread."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)

    def _path(self, spk_id: str) -> Path:
        return self._directory / f"{check_id(spk_id)}{SUFFIX}"

    def add(self, spk_id: str, voice: StoredVoice) -> None:
        """Store a voice, replacing one of the same name."""
        path = self._path(spk_id)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".new-", dir=self._directory)
        except OSError as error:
            raise RequestError(507, f"the voice cannot be stored: {error.strerror}") from error
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.msgpack.encode(voice))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise RequestError(507, f"the voice cannot be stored: {error.strerror}") from error

    def names(self) -> list[str]:
        try:
            entries = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        return sorted(
            name.removesuffix(SUFFIX)
            for name in entries
            if name.endswith(SUFFIX) and not name.startswith(".")
        )

    def stamp(self, spk_id: str) -> Stamp | None:
        """Return a value that changes whenever the voice does, or None if there is no such voice."""
        try:
            status = os.stat(self._path(spk_id))
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def has(self, spk_id: str) -> bool:
        """Whether there is a voice of this name."""
        return bool(_SAFE_ID.fullmatch(spk_id)) and self.stamp(spk_id) is not None

    def get(self, spk_id: str) -> StoredVoice | None:
        """Return a voice, or None. Raises RequestError (500) if the file is not a voice."""
        path = self._path(spk_id)
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=StoredVoice)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            raise RequestError(500, f"voice {spk_id!r} cannot be read: {error}") from error

    def remove(self, spk_id: str) -> bool:
        """Delete a voice; return False if there was none."""
        try:
            self._path(spk_id).unlink()
        except FileNotFoundError:
            return False
        return True
