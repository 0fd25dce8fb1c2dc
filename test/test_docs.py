"""The documents say what the code does."""

import re
import shlex
from pathlib import Path

import pytest

from light_tts.server import api_cli
from scripts.flags_table import flags_table, table_in

ROOT = Path(__file__).resolve().parent.parent


def flags_and_defaults(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]]


def test_readme_has_the_flags_of_this_version():
    assert table_in((ROOT / "README.md").read_text("utf-8")) == flags_table(), (
        "run: python scripts/flags_table.py --write"
    )


def test_chinese_readme_has_the_same_flags_and_defaults():
    chinese = table_in((ROOT / "README_zh.md").read_text("utf-8"))
    assert flags_and_defaults(chinese) == flags_and_defaults(flags_table())


def test_readme_names_the_flags_without_effect():
    text = (ROOT / "README.md").read_text("utf-8")
    assert [name for name in api_cli.WITHOUT_EFFECT if f"`--{name}`" not in text] == []


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_presets_of_the_readme_start(page: str):
    presets = re.findall(r"^```\n(--.*)\n```$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    assert len(presets) == 3
    for preset in presets:
        checkpoint = str(ROOT / "test" / "golden" / "cosyvoice2" / "checkpoint")
        assert api_cli.parse([*shlex.split(preset), "--model_dir", checkpoint]).settings


@pytest.mark.parametrize("page", ["README.md", "README_zh.md", "docs/architecture.md", "docs/performance.md"])
def test_every_file_that_a_page_links_to_exists(page: str):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_files_named_in_the_architecture_page_exist():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    named = set(
        re.findall(r"`((?:light_tts|server|models|common|utils|scripts|config)/[\w/.-]+\.\w+)`", text)
    )
    missing = [
        name for name in named if not any((base / name).exists() for base in (ROOT, ROOT / "light_tts"))
    ]
    assert named and not missing
