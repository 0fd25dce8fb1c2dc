"""`light-tts voices`: lists, adds and removes the named voices of a running server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from urllib.parse import quote

from light_tts.cli.client import Problem, add_server_arguments, running


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("voices", help="list, add or remove voices")
    parser.set_defaults(run=list_voices)
    add_server_arguments(parser)
    actions = parser.add_subparsers(metavar="ACTION")
    listing = actions.add_parser("list", help="list the voices (default)")
    listing.set_defaults(run=list_voices)
    adding = actions.add_parser("add", help="store the voice of a recording under a name")
    adding.add_argument("name")
    adding.add_argument("recording", type=Path, help="WAV, FLAC, OGG or MP3")
    adding.add_argument("--text", help="its transcript (default: the contents of RECORDING.txt, else none)")
    adding.set_defaults(run=add_voice)
    removing = actions.add_parser("remove", help="forget a voice")
    removing.add_argument("name")
    removing.set_defaults(run=remove_voice)
    for action in (listing, adding, removing):
        add_server_arguments(action, nested=True)


def list_voices(args: argparse.Namespace) -> int:
    listed = running(args).voices()
    width = max(map(len, listed["spk_ids"]), default=0)
    for name in listed["spk_ids"]:
        print(
            f"{name:<{width}}  {'of the checkpoint' if name in listed['checkpoint_speakers'] else 'stored'}"
        )
    return 0


def add_voice(args: argparse.Namespace) -> int:
    beside = args.recording.with_suffix(".txt")
    text = args.text
    if text is None:
        text = beside.read_text("utf-8").strip() if beside.is_file() else ""
    try:
        recording = args.recording.read_bytes()
    except OSError as error:
        raise Problem(f"{args.recording}: {error.strerror}") from None
    fields = {"spk_id": args.name, "prompt_text": text}
    running(args).ask("POST", "/add_spk", data=fields, files={"prompt_wav": (args.recording.name, recording)})
    print(f"{args.name} is stored" + ("" if text else " (its way of speaking needs --text)"))
    return 0


def remove_voice(args: argparse.Namespace) -> int:
    running(args).ask("DELETE", f"/spk/{quote(args.name, safe='')}")
    print(f"{args.name} is removed")
    return 0
