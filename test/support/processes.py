"""Processes, told by their command lines."""

from __future__ import annotations

import psutil


def command_line(process: psutil.Process) -> list[str]:
    """The words of its command; [] where it has ended, also while its parent has not yet waited for it."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def find_below(pid: int, *words: str) -> list[psutil.Process]:
    """The running descendants of a process whose command lines have these words, one after the other."""
    wanted = list(words)

    def matches(line: list[str]) -> bool:
        return any(line[start : start + len(wanted)] == wanted for start in range(len(line)))

    descendants = psutil.Process(pid).children(recursive=True)
    return [process for process in descendants if matches(command_line(process))]
