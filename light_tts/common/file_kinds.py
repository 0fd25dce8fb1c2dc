"""Identifies a file by its first bytes, for the message that it cannot be read as a recording."""

from __future__ import annotations

READABLE = "WAV, FLAC, OGG, MP3 and AIFF"  # the common ones among the formats that libsndfile supports

_DAMAGED = "that is damaged, truncated or uses an unusual encoding"
# (offset, bytes at that offset, description); the first match counts
_KINDS = (
    (8, b"WAVE", f"a WAV file {_DAMAGED}"),
    (0, b"fLaC", f"a FLAC file {_DAMAGED}"),
    (0, b"OggS", f"an OGG file {_DAMAGED}"),
    (8, b"AIF", f"an AIFF file {_DAMAGED}"),
    (0, b"ID3", f"an MP3 file {_DAMAGED}"),
    (0, b"\xff\xfb", f"an MP3 file {_DAMAGED}"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"\xff\xf9", "AAC"),
    (4, b"ftypM4A", "M4A (MPEG-4 audio)"),
    (4, b"ftypqt", "a QuickTime movie"),
    (4, b"ftyp3g", "3GP"),
    (4, b"ftyp", "MP4"),
    (0, b"\x1aE\xdf\xa3", "WebM or Matroska"),
    (0, b"#!AMR", "AMR"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA"),
    (8, b"AVI ", "an AVI film"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
)


def what_it_is(data: bytes) -> str:
    """Return a noun phrase such as "a WAV file that is damaged" or "text"."""
    if not data:
        return "empty"
    for offset, magic, kind in _KINDS:
        if data.startswith(magic, offset):
            return kind
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if start.startswith((b"{", b"[")) and _is_text(start):
        return "JSON"
    if not data.strip(b"\0"):
        return "nothing but zero bytes"
    return "text" if _is_text(data[:512]) else "of an unknown type"


def _is_text(data: bytes) -> bool:
    """Return whether the bytes are printable UTF-8, except for a character cut off at the end."""
    text = data.decode(errors="ignore")
    whole = len(text.encode()) > len(data) - 4
    return whole and all(character.isprintable() or character.isspace() for character in text)
