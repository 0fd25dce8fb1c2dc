"""Launchers are made one at a time, whichever threads launch kernels."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")

from light_tts.kernels import launchers  # noqa: E402


class Loader:
    """Like CPython with C extensions of one name: there is one module, with the contents loaded last."""

    def __init__(self) -> None:
        self.module = SimpleNamespace()

    def launcher(self, source: str, metadata: None) -> str:
        self.module.launch = source
        time.sleep(0.001)  # another thread loads another one
        return self.module.launch


@pytest.fixture
def active(monkeypatch) -> SimpleNamespace:
    """In place of Triton's driver."""
    active = SimpleNamespace(launcher_cls=Loader().launcher)
    monkeypatch.setattr(launchers, "driver", SimpleNamespace(active=active))
    return active


def mistaken(active: SimpleNamespace) -> int:
    """Return how many of 64 launchers, made by eight threads, are those of others."""
    sources, together = [f"kernel {number}" for number in range(64)], threading.Barrier(8)
    with ThreadPoolExecutor(8, initializer=together.wait) as pool:
        made = pool.map(lambda source: active.launcher_cls(source, None), sources)
        return sum(launcher != source for launcher, source in zip(made, sources, strict=True))


def test_launchers_are_not_mistaken_for_one_another(active):
    assert mistaken(active)
    launchers.make_one_at_a_time()
    launchers.make_one_at_a_time()
    assert mistaken(active) == 0
