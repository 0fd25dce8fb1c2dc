"""`light-tts check DIR`: checks whether this machine can serve a checkpoint directory."""

from __future__ import annotations

import argparse
import gc
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from light_tts.cli import machine
from light_tts.cli.client import Problem
from light_tts.cli.findings import Findings
from light_tts.cli.measures import measure
from light_tts.models.family import family_type, load_family
from light_tts.server.core.default_checkpoint import default_checkpoint
from light_tts.server.core.settings import Settings, SettingsError
from light_tts.server.core.styles import STYLE_FILE, StyleError, load_styles
from light_tts.tools.arguments import parse_count

SPEAKERS = "spk2info.pt"
SENTENCES = 10  # spoken by --measure


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="check whether this machine can serve a checkpoint",
        description="Load every component of a checkpoint like the server and report what this machine "
        "provides. Exit code 1 if a server could not start.",
    )
    parser.add_argument(
        "directory", metavar="DIR", nargs="?", help="default: the voice that comes with Light-TTS"
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="only check that the files exist")
    depth.add_argument(
        "--measure",
        metavar="N",
        nargs="?",
        type=parse_count,
        const=SENTENCES,
        help="also compare the flow with the graph exported beside it, and score N spoken sentences "
        "(default: %(const)s) if the extra [evaluate] is installed",
    )
    parser.add_argument("--host", default=Settings().host, help="address to check (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=Settings().port, help="port to check (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        directory = Path(args.directory) if args.directory else default_checkpoint()
    except SettingsError as error:
        raise Problem(str(error)) from None
    if not directory.is_dir():
        raise Problem(f"{directory}: no such directory")
    findings = Findings()
    machine.look(findings)
    _port(findings, args.host, args.port)
    findings.heading(f"Checkpoint {directory}")
    if _files(findings, directory) and not args.quick:
        _load(findings, directory)
        if args.measure and not findings.bad:
            measure(findings, directory, args.measure)
    print()
    if findings.bad:
        print(f"A server will not start: {', '.join(findings.bad)}.")
        return 1
    print(f"A server will start: light-tts serve --model_dir {directory}")
    return 0


def _port(findings: Findings, host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            findings.fail(
                "port", f"{host}:{port}: {getattr(error, 'strerror', None) or error}; try another --port"
            )
        else:
            findings.ok("port", f"{host}:{port} is free")


def _files(findings: Findings, directory: Path) -> bool:
    """Return whether all files exist."""
    missing = [name for name in family_type(directory).files if not (directory / name).exists()]
    try:
        styles = load_styles(directory)
        names = ", ".join(style.name for style in styles)
        findings.ok("styles", names if (directory / STYLE_FILE).exists() else "one (llm.pt)")
    except StyleError as error:
        findings.fail("styles", str(error))
        return False
    if missing:
        findings.fail("files", f"missing: {', '.join(missing)}")
        return False
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    findings.ok("files", f"all there, {size / machine.GB:.2f} GB")
    return True


def _load(findings: Findings, directory: Path) -> None:
    """Load each component in turn, like the stages, on the CPU."""
    for what, load in _parts(directory):
        begun = time.monotonic()
        try:
            text = load()
        except Exception as error:  # any error in a file; the message names it
            findings.fail(what, str(error))
        else:
            findings.ok(what, f"{text} ({time.monotonic() - begun:.1f} s)")
        gc.collect()


def _parts(directory: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    import torch

    def size(model: torch.nn.Module) -> str:
        return f"{sum(weights.numel() for weights in model.parameters()) / 1e6:.1f} million weights"

    def settings() -> str:
        family = load_family(directory)
        numbers = family.numbers
        rate = numbers.sample_rate // numbers.samples_per_token
        return f"{family.name}, {numbers.sample_rate} Hz, {rate} speech tokens a second"

    def frontend() -> str:
        speakers = sorted(load_family(directory).load_frontend({}, 1).speakers)
        return f"stored speakers: {', '.join(speakers)}" if speakers else f"no stored speakers ({SPEAKERS})"

    def language_model(path: Path) -> str:
        return size(load_family(directory).load_llm(path, torch.device("cpu"), torch.float32))

    yield "settings", settings
    yield "text, prompts", frontend
    for style in load_styles(directory):
        yield f"LLM {style.name}", partial(language_model, style.llm_path)
    yield "flow", lambda: size(load_family(directory).read_flow())
    yield "vocoder", lambda: size(load_family(directory).read_vocoder())
