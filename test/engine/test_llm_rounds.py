"""Rounds of several decode steps, launched before earlier results are read, produce exactly the output of
single steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.llm_requests import GOLDEN, TEXT, Loop, alone, bistream, request, speak

from light_tts.common.sampling import draw
from light_tts.tools.parity.llm import load_model

PACES = [(0, 3), (1, 1), (1, 8), (2, 5)]
paces = pytest.mark.parametrize(("ahead", "round_steps"), PACES)


def expected(count: int = 6) -> list[list[int]]:
    return [alone(i) for i in range(count)]


@paces
def test_requests_say_what_they_say_alone_and_never_run_beyond_their_longest(ahead, round_steps):
    sequences = [request(i) for i in range(6)]
    loop = Loop(ahead, round_steps, steps_between_admissions=8)
    begun = [len(s.inputs) for s in sequences]

    def check_lengths(step: int) -> None:
        for s, prompt in zip(sequences, begun, strict=True):
            assert s.cached <= prompt + s.max_outputs - 1  # the last token is never fed

    loop.run(sequences, check_lengths)
    assert [s.outputs for s in sequences] == expected()


@paces
def test_prefill_in_pieces_and_pauses_change_nothing(ahead, round_steps):
    sequences = [request(i) for i in range(6)]
    longest = max(len(s.inputs) + s.max_outputs for s in sequences)
    loop = Loop(ahead, round_steps, slots=longest, busy_ratio=1.0, assumed_output=1, prefill_tokens=16)
    loop.run(sequences)
    assert loop.paused
    assert [s.outputs for s in sequences] == expected()


def test_rounds_end_where_the_next_admission_is_due():
    loop = Loop(1, 8, steps_between_admissions=5)
    loop.run([request(5)])
    assert {tokens for work in loop.launched[1:] for _, tokens in work} <= {1, 2, 3, 4, 5}


@paces
def test_bistream_is_the_same_whenever_its_text_comes(ahead, round_steps):
    sequences = [bistream(seed) for seed in (5, 6, 7)]
    whole = [speak(bistream(seed), [TEXT]) for seed in (5, 6, 7)]
    assert all(load_model(GOLDEN).ids.fill in outputs for outputs in whole)
    texts = [list(TEXT) for _ in sequences]

    def feed(step: int) -> None:
        for i, (sequence, text) in enumerate(zip(sequences, texts, strict=True)):
            if text and (step + i) % 3 == 0:
                sequence.append_text(text[: i + 1])
                del text[: i + 1]
                if not text:
                    sequence.finish_text()

    def keep_awake(step: int) -> None:
        feed(step)
        while any(texts) and not loop.scheduler.has_work:
            step += 1
            feed(step)

    loop = Loop(ahead, round_steps)
    keep_awake(0)
    loop.run([*sequences, request(2)], keep_awake)
    assert [s.outputs for s in sequences] == whole


@paces
def test_resumed_requests_go_on_with_the_same_tokens(ahead, round_steps):
    sequences = [request(i, forced=alone(i)[: 7 * i]) for i in range(6)]
    resumed = bistream(forced=speak(bistream(), [TEXT])[:33])
    resumed.append_text(TEXT)
    resumed.finish_text()
    Loop(ahead, round_steps).run([*sequences, resumed])
    assert [s.outputs for s in sequences] == expected()
    assert resumed.outputs == speak(bistream(), [TEXT])


@paces
def test_what_is_aborted_on_its_way_leaves_the_others_alone(ahead, round_steps):
    sequences = [request(i) for i in range(6)]
    loop = Loop(ahead, round_steps)

    def abort(step: int) -> None:
        if step in (3, 4, 6):
            loop.abort(sequences[step - 2])

    loop.run(sequences, abort)
    assert [sequences[i].outputs for i in (0, 3, 5)] == [alone(i) for i in (0, 3, 5)]
    for i in (1, 2, 4):
        assert sequences[i].outputs == alone(i)[: len(sequences[i].outputs)]


class FailingLoop(Loop):
    """If a launch fails, each request is retried alone, like in the LLM stage."""

    failures = 0

    def launch(self, work):
        try:
            self.engine.launch(work)
        except RuntimeError:
            self.failures += 1
            while self.engine.in_flight:
                self.collect()
            for item in self.engine.restart(work):
                self.launch([item])


@paces
def test_a_launch_that_fails_leaves_everything_as_it_was(ahead, round_steps):
    calls = 0

    def fails(*args):
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise RuntimeError("no luck")
        return draw(*args)

    sequences = [request(i) for i in range(4)]
    loop = FailingLoop(ahead, round_steps, engine={"draw": fails})
    loop.run(sequences)
    assert loop.failures > 3
    assert [s.outputs for s in sequences] == expected(4)


def test_the_benchmark_runs_with_and_without_a_model(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "bench_llm.py"
    for flags in (["--stub"], []):
        command = [sys.executable, script, "--size", "tiny", "--batches", "2", "--output", "20", *flags]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--json", tmp_path / "out.json"], check=True, env=environment)
        (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
        assert result["batch"] == 2 and result["tokens_a_second"] > 0
