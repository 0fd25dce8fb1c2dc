"""Requests to the golden language model, and the loop that drives engine and scheduler like the LLM stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from light_tts.common.sampling_rule import SamplingRule
from light_tts.engine.llm.bistream import Bistream
from light_tts.engine.llm.engine import LLMEngine, Work
from light_tts.engine.llm.one_shot import OneShot
from light_tts.engine.llm.scheduler import Limits, Scheduler
from light_tts.engine.llm.sequence import PartRequest, Sequence
from light_tts.tools.parity import Golden
from light_tts.tools.parity.llm import SLOTS, finish, golden_ids, load_engine, load_model, run

GOLDEN, GOLDEN3 = (
    Golden(Path(__file__).parents[1] / "golden" / name) for name in ("cosyvoice2", "cosyvoice3")
)
ARRAYS = GOLDEN.arrays("llm.npz")
TEXT = golden_ids(ARRAYS, "bi_text_ids")
PROMPT = golden_ids(ARRAYS, "prompt_speech_token")
RULE = SamplingRule(0.8, 25, 10, 0.1)
RULES = (RULE, SamplingRule(0.5, 8, 10, 0.2, 0.8), SamplingRule(0.95, 60, 30, 0.1, 1.5))


def request(i: int, forced: list[int] = (), **options) -> OneShot:
    """One of many different requests."""
    lengths = {"min_outputs": 20 + i, "max_outputs": 40 + 5 * i, "limit": SLOTS}
    options = {**lengths, "sampling": RULES[i % len(RULES)], **options}
    part = PartRequest(
        job=f"{i}/0",
        part=i % 2,
        seed=1000 + i,
        ids=load_model(GOLDEN).ids,
        prompt_text=TEXT[: i % 4],
        prompt_speech=PROMPT[: 13 * i],
        forced=list(forced),
        **options,
    )
    return OneShot(part, TEXT[i : 3 * i + 4])


def bistream(seed: int = 5, forced: list[int] = (), **options) -> Bistream:
    part = PartRequest(
        job=f"b{seed}/0",
        part=0,
        seed=seed,
        ids=load_model(GOLDEN).ids,
        **{
            "limit": SLOTS,
            "max_outputs": 100,
            "sampling": RULE,
            "prompt_speech": PROMPT[:20],
            **options,
        },
        prompt_text=TEXT[:7],
        forced=list(forced),
    )
    return Bistream(part, mix=(5, 15))


@cache
def alone(i: int) -> list[int]:
    """Return the output of request i when it is run alone, step by step."""
    return finish(load_engine(GOLDEN), request(i))


def speak(sequence: Bistream, pieces: list[list[int]]) -> list[int]:
    """Return the outputs of a bistream sequence if each piece of text arrives only after everything possible
    has run."""
    engine = load_engine(GOLDEN)
    for piece in pieces:
        sequence.append_text(piece)
        while sequence.ready:
            run(engine, sequence)
    sequence.finish_text()
    return finish(engine, sequence)


class Loop:
    """Scheduler and engine, driven as the LLM stage drives them. `ahead`, `round_steps`: see its Pace;
    `engine`: options of `load_engine`; other options: see Limits."""

    def __init__(
        self, ahead: int = 0, round_steps: int = 1, slots: int = SLOTS, engine: dict | None = None, **limits
    ) -> None:
        limits = {
            "prefill_tokens": 512,
            "prefill_requests": 8,
            "running": 8,
            "alive": 8,
            "steps_between_admissions": 4,
            "busy_ratio": 0.0,
            "assumed_output": 10,
            **limits,
        }
        self.scheduler = Scheduler(Limits(slots=slots, round_steps=round_steps, **limits))
        options = {"slots": slots, "round_steps": round_steps, **(engine or {})}
        self.engine: LLMEngine = load_engine(GOLDEN, **options)
        self.ahead = ahead
        self.slots = slots
        self.launched: list[Work] = []
        self.paused = 0

    def step(self) -> None:
        self.scheduler.admit()
        plan = self.scheduler.plan()
        self.paused += len(plan.evicted)
        for sequence in plan.evicted:
            self.engine.release(sequence)
        if plan.work:
            self.launched.append(plan.work)
            self.launch(plan.work)
        elif self.engine.in_flight:
            self.collect()
        while self.engine.in_flight > self.ahead:
            self.collect()

    def launch(self, work: Work) -> None:
        self.engine.launch(work)

    def collect(self) -> None:
        for sequence, _ in self.engine.collect()[0]:
            if sequence.finished:
                self.scheduler.end(sequence)
                self.engine.release(sequence)

    def abort(self, sequence: Sequence) -> None:
        for aborted in self.scheduler.abort(sequence.job):
            self.engine.release(aborted)

    def run(self, sequences: list[Sequence], each_step: Callable[[int], None] = lambda step: None) -> None:
        """All of them to their ends; then nothing is held any more. `each_step` is called with the number of
        the step that comes next."""
        for sequence in sequences:
            self.scheduler.submit(sequence)
        step = 0
        while self.scheduler.has_work or self.engine.in_flight:
            each_step(step)
            self.step()
            step += 1
        assert self.engine._table.free == self.slots and self.engine._table.free_rows == 8
        assert self.scheduler.used_slots == 0
