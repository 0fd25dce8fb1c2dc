"""The work folder, in which every step leaves what the next one takes."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

FOLDER = Path("build/train_mini")


def argument_parser(description: str) -> argparse.ArgumentParser:
    """With the option that all steps have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=FOLDER, help="folder of all that training makes")
    return parser


def language_parser(description: str) -> argparse.ArgumentParser:
    """Likewise, for steps that differ by language."""
    parser = argument_parser(description)
    parser.add_argument(
        "--languages", nargs="+", choices=("en", "zh"), default=["en"], help="what the voice will speak"
    )
    return parser


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a file that `lines_to` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@contextlib.contextmanager
def lines_to(path: Path) -> Iterator[Callable[[Any], None]]:
    """Gives a function that writes a dataclass as a line of JSON. The file is there when all of it is."""
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", encoding="utf-8") as lines:
        yield lambda item: lines.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
    unfinished.replace(path)
