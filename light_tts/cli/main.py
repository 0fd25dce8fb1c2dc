"""Parses the command line and calls a subcommand. Exit codes: 0 success; 1 failure; 2 usage error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from light_tts import __version__
from light_tts.cli import bench, check, doctor, serve, speak, voices
from light_tts.cli.client import Problem

# These subcommands parse their own arguments, including --help.
PASSED_ON = {"serve": serve.run, "bench": bench.run}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="light-tts", description="Text to speech: the server and its tools."
    )
    parser.add_argument("--version", action="version", version=f"light-tts {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="start the server (accepts all its flags)", add_help=False)
    speak.add_parser(commands)
    voices.add_parser(commands)
    commands.add_parser("bench", help="measure a running server under load", add_help=False)
    check.add_parser(commands)
    doctor.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in PASSED_ON:
        return PASSED_ON[argv[0]](argv[1:])
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except Problem as problem:
        print(f"light-tts: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("light-tts: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # a pager or `head` that has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
