"""Builds a target of the Dockerfile without Docker: each stage is a directory, and each RUN line is executed
in it with chroot. For machines without a container engine, to test every line; requires root and mmdebstrap.

    python scripts/chroot_image.py cpu /var/tmp/image [--arg TORCH_INDEX=...] [--bind DIR] [--env NAME=VALUE]

Afterwards DIR/cpu contains the file system of the image, and the command of its ENTRYPOINT is printed.
Supports FROM, ARG, ENV, WORKDIR, COPY (directories keep their names), RUN, USER and ENTRYPOINT as used in
this Dockerfile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NETWORK = ("/etc/resolv.conf", "/etc/hosts")


@dataclass
class Stage:
    """The state of a build stage."""

    directory: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH, "HOME": "/root"})
    workdir: str = "/"
    user: str = ""
    entrypoint: tuple[str, ...] = ()


def lines(text: str) -> list[tuple[str, str]]:
    """Return (instruction, rest) for each line, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", "", text)
    split = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(instruction, rest) for instruction, rest in split]


class Build:
    def __init__(
        self, directory: Path, arguments: dict[str, str], binds: list[Path], environment: dict[str, str]
    ) -> None:
        """`binds`, `environment`: available to RUN lines in addition to the image."""
        self._environment = environment
        self._directory = directory
        self._arguments = arguments
        self._binds = binds
        self._stages: dict[str, Stage] = {}

    def stage(self, target: str, instructions: list[tuple[str, str]]) -> Stage:
        """Return the stage with this name, building the stages it is based on first."""
        if target in self._stages:
            return self._stages[target]
        start = next(
            n
            for n, (name, rest) in enumerate(instructions)
            if name == "FROM" and rest.endswith(f" AS {target}")
        )
        base = instructions[start][1].split()[0]
        stage = self._from(base, target, instructions)
        for name, rest in instructions[start + 1 :]:
            if name == "FROM":
                break
            self._do(stage, name, rest, instructions)
        self._stages[target] = stage
        return stage

    def _from(self, base: str, target: str, instructions: list[tuple[str, str]]) -> Stage:
        directory = self._directory / target
        shutil.rmtree(directory, ignore_errors=True)
        if base.startswith("debian:"):
            suite = base.removeprefix("debian:").removesuffix("-slim")
            command = ["mmdebstrap", "--variant=minbase", "--mode=root", suite, str(directory)]
            subprocess.run(command, check=True)
            return Stage(directory)
        before = self.stage(base, instructions)
        subprocess.run(["cp", "-a", "--reflink=auto", str(before.directory), str(directory)], check=True)
        return replace(before, directory=directory, environment=dict(before.environment))

    def _do(self, stage: Stage, name: str, rest: str, instructions: list[tuple[str, str]]) -> None:
        print(f"[{stage.directory.name}] {name} {rest}", flush=True)
        match name:
            case "ENV":
                for word in shlex.split(rest):
                    key, _, value = word.partition("=")
                    stage.environment[key] = value.replace("$PATH", stage.environment["PATH"])
            case "ARG":
                key, _, value = rest.partition("=")
                stage.environment[key] = self._arguments.get(key, value)
            case "WORKDIR":
                stage.workdir = rest
                (stage.directory / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "USER":
                stage.user = rest
            case "ENTRYPOINT":
                stage.entrypoint = tuple(json.loads(rest))
            case "COPY":
                self._copy(stage, shlex.split(rest), instructions)
            case "RUN":
                self._run(stage, rest)
            case "EXPOSE" | "VOLUME" | "STOPSIGNAL" | "HEALTHCHECK":
                pass
            case _:
                sys.exit(f"{name} is not known here")

    def _copy(self, stage: Stage, words: list[str], instructions: list[tuple[str, str]]) -> None:
        source_root = ROOT
        if words[0].startswith("--from="):
            source_root = self.stage(words.pop(0).removeprefix("--from="), instructions).directory
        *sources, target = words
        into = stage.directory / os.path.join(stage.workdir, target).lstrip("/")
        for source in sources:
            path = source_root / source.lstrip("/")
            if path.is_dir():
                into.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-a", f"{path}/.", str(into)], check=True)
            else:
                shutil.copy(path, into)

    def _run(self, stage: Stage, command: str) -> None:
        """Run a command; network and bound directories are available read-only and removed afterwards."""
        mounts, made = [], []
        for source in [*map(Path, NETWORK), *self._binds]:
            place = stage.directory / str(source).lstrip("/")
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.mkdir() if source.is_dir() else place.touch()
                made.append(place)
            mounts += [f"mount --bind {source} {place}", f"mount -o remount,ro,bind {place}"]
        inside = f"cd {shlex.quote(stage.workdir)}; {command}"
        inner = f"exec chroot {stage.directory} /bin/sh -ec {shlex.quote(inside)}"
        outer = " && ".join([*mounts, f"mount -t proc proc {stage.directory}/proc", inner])
        environment = {**stage.environment, **self._environment}
        subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "/bin/sh", "-ec", outer], env=environment, check=True
        )
        for place in made:
            place.rmdir() if place.is_dir() else place.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a target of the Dockerfile by chroot.")
    parser.add_argument("target")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bind", action="append", default=[], type=Path, help="of this machine, during RUN")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="during RUN")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    arguments, environment = (dict(pair.split("=", 1) for pair in pairs) for pairs in (args.arg, args.env))
    build = Build(args.directory, arguments, args.bind, environment)
    stage = build.stage(args.target, lines((ROOT / "Dockerfile").read_text("utf-8")))
    variables = [f"{key}={value}" for key, value in stage.environment.items()]
    who = ["--userspec", stage.user] if stage.user else []
    command = [
        "chroot",
        *who,
        str(stage.directory),
        "env",
        "-C",
        stage.workdir,
        *variables,
        *stage.entrypoint,
    ]
    print(shlex.join(command))


if __name__ == "__main__":
    main()
