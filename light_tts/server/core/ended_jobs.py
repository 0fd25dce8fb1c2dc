"""Jobs that have ended. Messages for them may still be in flight, and an Abort may even overtake its
own job.
"""

from __future__ import annotations

from collections import OrderedDict

REMEMBERED = 4096


class EndedJobs:
    """The names of the most recently ended jobs, at most `REMEMBERED`."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, None] = OrderedDict()  # oldest first

    def add(self, name: str) -> None:
        self._names[name] = None
        if len(self._names) > REMEMBERED:
            self._names.popitem(last=False)

    def __contains__(self, name: str) -> bool:
        return name in self._names
