"""constraints.txt has a release of everything that pyproject.toml asks for, and the tests run with these."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.server_process import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LOCK = (ROOT / "scripts" / "lock.sh").read_text("utf-8")
EXTRAS = re.search(r"^for name in (.*); do$", LOCK, re.MULTILINE)[1].split()
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if line and not line.startswith("#")
]


def wanted(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"]]
    for name in extras:
        lines += PROJECT["optional-dependencies"][name]
    return [Requirement(line) for line in lines]


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


def pinned(name: str, environment: dict[str, str]) -> Version:
    """The release of this package. It must be one."""
    name = canonicalize_name(name)
    found = [pin for pin in PINS if canonicalize_name(pin.name) == name and applies(pin, environment)]
    assert len(found) == 1, f"constraints.txt has {len(found)} releases of {name}: run scripts/lock.sh"
    return Version(str(found[0].specifier).removeprefix("=="))


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_what_is_asked_for_is_pinned(python: str):
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.9"}
    for requirement in wanted(*EXTRAS):
        if applies(requirement, environment):
            release = pinned(requirement.name, environment)
            assert release in requirement.specifier, f"{requirement}, not {release}: run scripts/lock.sh"


def test_every_extra_is_pinned_but_the_one_that_wants_other_releases():
    assert set(PROJECT["optional-dependencies"]) - set(EXTRAS) == {"agents"}


def installed(requirements: list[Requirement]) -> Iterator[metadata.Distribution]:
    """Yield the installed distributions of these requirements and of their dependencies."""
    waiting, seen = list(requirements), set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), *sorted(requirement.extras))
        if key in seen or not applies(requirement, default_environment()):
            continue
        seen.add(key)
        distribution = metadata.distribution(requirement.name)
        yield distribution
        for line in distribution.requires or []:
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if any(applies(needed, {**default_environment(), "extra": extra}) for extra in extras):
                needed.marker = None
                waiting.append(needed)


def test_the_tests_run_with_the_releases_that_are_pinned():
    for distribution in installed(wanted("test")):
        name, release = distribution.metadata["Name"], Version(distribution.version)
        assert Version(release.public) == pinned(name, default_environment()), (
            f"{name} is {release} here: bash scripts/install.sh test"
        )
