"""`light-tts speak TEXT|FILE|-`: plays a text, writes it to a file, or writes the chapters of a book to
files."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from light_tts.cli import client as server
from light_tts.cli import sink
from light_tts.cli.book import PART, SUBTITLE, BookPart, Chapter, chapters
from light_tts.cli.client import ChosenVoice, Client, Problem
from light_tts.cli.parts_store import PartsStore

AT_ONCE = 4
LONGEST_NAME = 60  # maximum characters of a chapter's title in a file name


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "speak",
        help="speak a text, a file or a book",
        description="Speak a text: to the loudspeaker, to a file whose extension selects the format, or "
        "to one file per chapter in a directory. The same command resumes a long text that "
        "was interrupted.",
    )
    parser.add_argument("text", metavar="TEXT|FILE|-", help="a text, the name of a text file, or - for stdin")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE|DIR/",
        help=f"a file ({' '.join(sink.EXTENSIONS)}), or a directory for one file per chapter (default: "
        "the loudspeaker)",
    )
    parser.add_argument(
        "--format", default="mp3", help="format of the files in a directory (default: %(default)s)"
    )
    parser.add_argument("--voice", help="a voice from `light-tts voices` (default: the first)")
    parser.add_argument("--recording", type=Path, metavar="FILE", help="use the voice of this recording")
    parser.add_argument("--recording_text", default="", metavar="TEXT", help="transcript of the recording")
    parser.add_argument("--style", help="style of the checkpoint (tts_model_name)")
    parser.add_argument("--speed", type=float, default=1.0, help="0.25 to 4 (default: 1)")
    parser.add_argument(
        "--srt",
        action="store_true",
        help="write subtitles next to each file; splits the text into short parts",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed; another seed gives another reading (default: 0)"
    )
    parser.add_argument(
        "--at_once",
        type=int,
        default=AT_ONCE,
        help="number of parts of a long text generated at once (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="print only errors")
    server.add_server_arguments(parser)
    own = parser.add_argument_group("if no server is running, one is started temporarily")
    own.add_argument("--model_dir", default="", help="its checkpoint")
    own.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found = chapters(read_text(args.text), SUBTITLE if args.srt else PART)
    if not found:
        raise Problem("there is nothing to speak: a text needs letters or digits")
    player = sink.find_player() if args.output is None else ""
    jobs = [] if args.output is None else files_to_write(args.output, args.format, found)
    for path, _ in jobs:
        sink.check_path(path)

    def say(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    with server.running_or_started(args, say) as client:
        speaker = ChapterSpeaker(
            client, choose_voice(args, client), args, say, sum(c.characters for c in found)
        )
        with speaker.bar:
            for path, part_of_it in jobs:
                speaker.to_file(part_of_it, path, keep=len(jobs) > 1)
            if not jobs:
                speaker.to_loudspeaker(found, player)
    return 0


def read_text(argument: str) -> str:
    """Return the text. Raises Problem."""
    if argument == "-":
        return sys.stdin.read()
    path = Path(argument)
    try:
        if path.is_file():
            return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise Problem(f"{path}: not a text in UTF-8") from None
    except OSError:  # the argument is too long for a file name
        return argument
    if re.fullmatch(r"\S+\.(txt|md)", argument):
        raise Problem(f"{path}: no such file")
    return argument


def files_to_write(
    output: str, format: str, found: Sequence[Chapter]
) -> list[tuple[Path, Sequence[Chapter]]]:
    """Return each file with the chapters in it: a single file, or one per chapter in a directory."""
    directory = Path(output)
    if not (output.endswith("/") or directory.is_dir()):
        return [(directory, found)]
    directory.mkdir(parents=True, exist_ok=True)
    digits = max(2, len(str(len(found))))
    jobs: list[tuple[Path, Sequence[Chapter]]] = []
    for number, chapter in enumerate(found, 1):
        title = re.sub(r"[^\w .,-]+", " ", chapter.title)[:LONGEST_NAME].strip(" .")
        name = f"{number:0{digits}} {title}".strip()
        jobs.append((directory / f"{name}.{format.lstrip('.')}", [chapter]))
    return jobs


def choose_voice(args: argparse.Namespace, client: Client) -> ChosenVoice:
    """Return the voice. Raises Problem."""
    if args.recording is not None:
        try:
            return ChosenVoice(recording=args.recording.read_bytes(), text=args.recording_text)
        except OSError as error:
            raise Problem(f"--recording {args.recording}: {error.strerror}") from None
    names = client.voices()["spk_ids"]
    if not names:
        raise Problem("the server has no voices: give --recording, or add one with `light-tts voices add`")
    if args.voice and args.voice not in names:
        raise Problem(f"--voice {args.voice}: the server has {', '.join(names)}")
    return ChosenVoice(name=args.voice or names[0])


class ChapterSpeaker:
    """Speaks chapters with one voice and shows progress."""

    def __init__(
        self, client: Client, voice: ChosenVoice, args: argparse.Namespace, say: Any, characters: int
    ) -> None:
        self._client = client
        self._voice = voice
        self._options = {"seed": args.seed, "speed": args.speed}
        self._options |= {"model": args.style} if args.style else {}
        self._srt = args.srt
        self._at_once = max(1, args.at_once)
        self._say = say
        hidden = True if args.quiet else None  # None: hidden unless the output is a terminal
        self.bar = tqdm(total=characters, unit=" characters", disable=hidden, leave=False)

    def to_loudspeaker(self, found: Sequence[Chapter], player: str) -> None:
        parts = [part for chapter in found for part in chapter.parts]
        with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
            following = None
            speaker = None
            for index, part in enumerate(parts):
                pieces = following.result() if following else self._pieces(part)
                if index + 1 < len(parts):  # requested while the current part is playing
                    following = None if speaker is None else pool.submit(self._whole, parts[index + 1])
                for rate, pcm in pieces:
                    if speaker is None:
                        speaker = stack.enter_context(sink.loudspeaker(player, rate))
                        if index + 1 < len(parts):
                            following = pool.submit(self._whole, parts[index + 1])
                    speaker.write(pcm)
                    speaker.flush()
                if speaker is not None and index + 1 < len(parts):
                    speaker.write(silence(part.pause, rate))
                self.bar.update(len(part.text))

    def to_file(self, found: Sequence[Chapter], path: Path, keep: bool = False) -> None:
        """`keep`: an existing file is complete and is not written again."""
        if keep and path.exists():
            self.bar.update(sum(chapter.characters for chapter in found))
            return
        begun = time.monotonic()
        store = PartsStore(path, self._voice, self._options)
        parts = [part for chapter in found for part in chapter.parts]
        if len(parts) == 1 and not self._srt:
            seconds = self._one_part(parts[0], path)
        else:
            self._speak_all(parts, store)
            seconds = self._join(parts, store, path)
            store.remove()
        took = time.monotonic() - begun
        self.bar.clear()
        self._say(f"{path}: {seconds:.1f} s of audio in {took:.1f} s")

    def _one_part(self, part: BookPart, path: Path) -> float:
        """Write a single part while it is generated."""
        with ExitStack() as stack:
            output = None
            written = 0
            for rate, pcm in self._pieces(part):
                if output is None:
                    output = stack.enter_context(sink.file_sink(path, rate))
                output.write(pcm)
                written += len(pcm)
        self.bar.update(len(part.text))
        return written / 2 / rate

    def _speak_all(self, parts: Sequence[BookPart], store: PartsStore) -> None:
        """Speak all parts into the store; those of an earlier run are skipped."""
        missing = []
        for text in dict.fromkeys(part.text for part in parts):
            if store.find(text):
                self.bar.update(len(text))
            else:
                missing.append(text)
        if len(missing) < len(parts) and store.directory.exists():
            self._say(f"going on: {len(parts) - len(missing)} of {len(parts)} parts are there")

        def speak(text: str) -> None:
            pieces = list(self._pieces(BookPart(text, 0.0)))
            store.add(text, pieces[0][0], b"".join(pcm for _, pcm in pieces))
            self.bar.update(len(text))

        pool = ThreadPoolExecutor(self._at_once)
        try:
            for _ in pool.map(speak, missing):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    def _join(self, parts: Sequence[BookPart], store: PartsStore, path: Path) -> float:
        """Return the seconds of audio in the file."""
        rate, _ = store.read(parts[0].text)
        written = 0
        lines: list[str] = []
        with sink.file_sink(path, rate) as output:
            for part in parts:
                _, pcm = store.read(part.text)
                begun, ended = written / 2 / rate, (written + len(pcm)) / 2 / rate
                lines.append(subtitle(len(lines) + 1, begun, ended, part.text))
                pcm += silence(part.pause, rate) if part is not parts[-1] else b""
                output.write(pcm)
                written += len(pcm)
        if self._srt:
            path.with_suffix(".srt").write_text("\n".join(lines), "utf-8")
        return written / 2 / rate

    def _whole(self, part: BookPart) -> list[tuple[int, bytes]]:
        return list(self._pieces(part))

    def _pieces(self, part: BookPart) -> Iterator[tuple[int, bytes]]:
        """Yield (sample rate, complete samples) as they arrive."""
        half = b""
        for rate, piece in self._client.speech(part.text, self._voice, self._options):
            piece = half + piece
            whole = len(piece) // 2 * 2
            half = piece[whole:]
            if whole:
                yield rate, piece[:whole]


def subtitle(number: int, begun: float, ended: float, text: str) -> str:
    """Return one subtitle of an SRT file."""

    def clock(seconds: float) -> str:
        whole, milliseconds = divmod(round(seconds * 1000), 1000)
        return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02},{milliseconds:03}"

    return f"{number}\n{clock(begun)} --> {clock(ended)}\n{text}\n"


def silence(seconds: float, rate: int) -> bytes:
    return bytes(2 * round(seconds * rate))
