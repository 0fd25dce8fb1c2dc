"""The documents say what the code does."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.server_process import PROMPT_TEXT, PROMPT_WAV

from light_tts.server import api_cli
from scripts.api_reference import SECTION as REFERENCE
from scripts.flags_table import SECTION as FLAGS

ROOT = Path(__file__).resolve().parents[2]


def flags_and_defaults(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]]


def test_the_page_of_flags_has_those_of_this_version():
    assert FLAGS.read() == FLAGS.make(), "run: python scripts/flags_table.py --write"


def test_the_reference_of_the_api_is_that_of_this_version():
    assert REFERENCE.read() == REFERENCE.make(), "run: python scripts/api_reference.py --write"


def test_every_route_and_field_of_the_reference_has_a_meaning():
    rows = [line.split(" | ") for line in REFERENCE.make().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert [row for row in rows if not row[1 if "/" in row[0] else -1].strip(" |")] == []


def test_the_chinese_page_has_the_same_flags_and_defaults():
    chinese = FLAGS.read(ROOT / "docs" / "zh" / "flags.md")
    assert flags_and_defaults(chinese) == flags_and_defaults(FLAGS.make())


@pytest.fixture(scope="module")
def named(server):
    """A server that has voices of the names that the pages use for stored speakers."""
    with server.client() as client:
        for name in ("anna", "henry"):
            voice = {"spk_id": name, "prompt_text": PROMPT_TEXT}
            client.post(
                "/add_spk", data=voice, files={"prompt_wav": PROMPT_WAV.read_bytes()}
            ).raise_for_status()
        yield server
        for name in ("anna", "henry"):
            client.delete(f"/spk/{name}")


def examples(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for found, code in blocks if found == language and "localhost:8080" in code]


@pytest.mark.parametrize("page", ["README.md", "docs/native.md", "docs/zh/native.md", "docs/api.md"])
def test_curl_examples_give_audio(named, page: str, tmp_path: Path):
    shutil.copy(PROMPT_WAV, tmp_path / "voice.wav")
    for example in examples(page, ""):
        command = example.replace("localhost:8080", f"127.0.0.1:{named.port}").replace("aplay", "cat #")
        command = command.replace("curl ", "curl -sS --fail-with-body ")
        done = subprocess.run(["bash", "-ec", command], cwd=tmp_path, capture_output=True, timeout=120)
        assert done.returncode == 0, (example, done.stdout[-500:], done.stderr[-500:])
        speech = tmp_path / "speech.wav"
        assert len(speech.read_bytes() if speech.exists() else done.stdout) > 1_000, example
        speech.unlink(missing_ok=True)


@pytest.mark.parametrize("page", ["docs/native.md", "docs/zh/native.md"])
def test_websocket_example_gives_audio(server, page: str, tmp_path: Path):
    shutil.copy(PROMPT_WAV, tmp_path / "voice.wav")
    [example] = [code for code in examples(page, "python") if "websockets" in code]
    code = example.replace("localhost:8080", f"127.0.0.1:{server.port}")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "speech.pcm").stat().st_size > 1_000


def test_python_examples_of_the_api_give_audio(server, tmp_path: Path):
    found = examples("docs/api.md", "python")
    assert len(found) >= 2
    for example in found:
        code = example.replace("localhost:8080", f"127.0.0.1:{server.port}")
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=120)
        assert done.returncode == 0, (example, done.stderr)
        [speech] = tmp_path.iterdir()
        assert speech.stat().st_size > 1_000, example
        speech.unlink()


def test_the_page_of_flags_names_those_without_effect():
    text = (ROOT / "docs" / "flags.md").read_text("utf-8")
    assert [name for name in api_cli.WITHOUT_EFFECT if f"`--{name}`" not in text] == []


@pytest.mark.parametrize("page", ["docs/tuning.md", "docs/zh/tuning.md"])
def test_presets_start(page: str):
    presets = re.findall(r"^```\n(--.*)\n```$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    assert len(presets) == 4
    for preset in presets:
        checkpoint = str(ROOT / "test" / "golden" / "cosyvoice2" / "checkpoint")
        assert api_cli.parse([*shlex.split(preset), "--model_dir", checkpoint]).settings


@pytest.mark.parametrize(
    "page",
    [
        "CONTRIBUTING.md",
        "README.md",
        "README_zh.md",
        *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))),
        "pretrained_models/light-tts-mini/README.md",
        "training/README.md",
    ],
)
def test_every_file_that_a_page_links_to_exists(page: str):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_files_named_in_the_architecture_page_exist():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    named = set(
        re.findall(
            r"`((?:light_tts|server|engine|models|kernels|common|training|scripts|config)/[\w/.-]+\.\w+)`",
            text,
        )
    )
    missing = [
        name for name in named if not any((base / name).exists() for base in (ROOT, ROOT / "light_tts"))
    ]
    assert named and not missing


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_readme_is_short(page: str):
    assert len((ROOT / page).read_text("utf-8").splitlines()) <= 200
