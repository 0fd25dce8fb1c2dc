"""The encode stage over real sockets, with the inboxes of a worker and an LLM."""

import contextlib
import hashlib
import logging
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from support.processes import command_line

from light_tts.common.audio import read_audio
from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.checkpoint.inputs import COSYVOICE3_INPUTS
from light_tts.models.frontend import spellers
from light_tts.models.frontend.frontend import Frontend
from light_tts.models.frontend.tokenizer import TextTokenizer
from light_tts.server.core import messages as m
from light_tts.server.core.channel import Inbox, Outbox, Peers
from light_tts.server.core.prompt_cache import attach
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings
from light_tts.server.core.stage import StageContext
from light_tts.server.tts_encode import manager

GOLDEN = Path("test/golden/cosyvoice2")
CHECKPOINT = GOLDEN / "checkpoint"
CHECKPOINT3 = Path("test/golden/cosyvoice3/checkpoint")
FEATURE_SECONDS = 10.0  # timeout for one message; usually milliseconds


class Stage:
    """One encode process (as a thread) and its peers."""

    def __init__(self, run_dir: RunDir, settings: Settings) -> None:
        self.run_dir, self.settings = run_dir, settings
        self.worker = Inbox(f"ipc://{run_dir.root}/worker")
        self.llm = Inbox(f"ipc://{run_dir.root}/llm-0.0")
        self.supervisor = Inbox(run_dir.supervisor)
        self.outbox = Outbox()
        self._queues: dict[Inbox, list[m.Message]] = {}
        self._incarnation = 0
        self.start()

    def start(self) -> None:
        address = self.run_dir.stage_address("encode", 0, self._incarnation)
        outbox = Outbox()
        ctx = StageContext(
            settings=self.settings,
            run_dir=self.run_dir,
            stage="encode",
            index=0,
            incarnation=self._incarnation,
            inbox=Inbox(address),
            outbox=outbox,
            peers=Peers(outbox),
            log=logging.getLogger("light_tts.encode"),
        )
        llm = m.StageInfo(stage="llm", index=0, incarnation=0, address=self.llm.address, state="up")
        ctx.peers.apply(m.Topology(stages=[llm]))
        self._ctx, self.address = ctx, address
        self._thread = threading.Thread(target=manager.run, args=(ctx,))
        self._thread.start()
        self._incarnation += 1

    def stop(self) -> None:
        self.send(m.Shutdown())
        self._thread.join(FEATURE_SECONDS)
        assert not self._thread.is_alive()
        self._ctx.inbox.close()
        self._ctx.outbox.close()
        self.outbox.forget(self.address)

    def close(self) -> None:
        self.stop()
        for inbox in (self.worker, self.llm, self.supervisor):
            inbox.close()
        self.outbox.close()

    def send(self, *sent: m.Message) -> None:
        for message in sent:
            self.outbox.send(self.address, message)

    def next(self, inbox: Inbox, timeout: float = FEATURE_SECONDS) -> m.Message:
        """The next message in this inbox."""
        queue = self._queues.setdefault(inbox, [])
        deadline = time.monotonic() + timeout
        while not queue:
            left = deadline - time.monotonic()
            assert left > 0, "no message came"
            queue += inbox.wait(left)
        return queue.pop(0)

    def failure(self) -> m.Failed:
        """Return the next failure sent to the HTTP worker."""
        message = self.next(self.worker)
        assert isinstance(message, m.Failed)
        return message

    def is_silent(self, inbox: Inbox, seconds: float = 0.5) -> bool:
        with contextlib.suppress(AssertionError):
            self.next(inbox, seconds)
            return False
        return True

    def segments(self) -> list[Path]:
        return list(self.run_dir.shm.glob("*.prompt"))


@pytest.fixture
def make_stage(socket_path):
    with contextlib.ExitStack() as cleanup:

        def make(model_dir: Path = CHECKPOINT, **settings) -> Stage:
            run_dir = RunDir.create(f"ipc://{socket_path}/", 1)
            cleanup.callback(run_dir.remove)
            stage = Stage(run_dir, Settings(model_dir=str(model_dir), **settings))
            cleanup.callback(stage.close)
            assert isinstance(stage.next(stage.supervisor, 60), m.StageReady)
            return stage

        yield make


def noise(seconds: float, seed: int = 0, rate: int = 24_000) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate)).astype(np.float32)


def prompt(samples: np.ndarray, text: str = "Good morning.", rate: int = 24_000) -> m.Prompt:
    return m.Prompt(
        text=text,
        key=hashlib.sha256(samples.tobytes()).hexdigest(),
        sample_rate=rate,
        audio=m.Raw.of(samples),
    )


def synthesize(
    stage: Stage,
    job: str,
    voice: m.Prompt,
    text: str = "Hello world.",
    speed: float = 1.0,
    report: bool = False,
    **fields,
) -> m.Synthesize:
    fields = {"reply_to": stage.worker.address, "style": 0, "stream": True, **fields}
    return m.Synthesize(
        job=job,
        text=text,
        prompt=voice,
        options=m.SpeechOptions(seed=5, speed=speed, report=report),
        **fields,
    )


def test_a_request_becomes_ids_and_features(make_stage):
    stage, expected = make_stage(), np.load(GOLDEN / "frontend.npz")
    samples, rate = read_audio((GOLDEN / "prompt.wav").read_bytes(), 0.5, 30)
    stage.send(synthesize(stage, "a/1", prompt(samples, rate=rate), speed=1.5, stream=False))
    generate = stage.next(stage.llm)
    assert (generate.job, generate.part, generate.parts) == ("a/1", 0, 1)
    assert (generate.options.speed, generate.stream, generate.options.seed) == (1.5, False, 5)
    assert generate.text_ids == expected["text"][0].tolist()
    assert generate.prompt_text_ids == expected["prompt_text"][0].tolist()
    tokens = expected["aligned_token"][0]
    assert generate.prompt_speech_token.array(np.int32).tolist() == tokens.tolist()
    assert generate.flow_prompt_tokens == len(tokens)
    features = attach(generate.prompt.segment)
    assert features.speech_token.tolist() == tokens.tolist()
    assert np.abs(features.mel - expected["aligned_feat"][0]).max() < 1e-4
    assert np.abs(features.embedding - expected["embedding"][0]).max() < 1e-3


def test_texts_are_spelled_in_processes_that_end_with_the_stage(make_stage, monkeypatch):
    monkeypatch.setattr(manager, "speller_processes", lambda: 2)
    stage = make_stage()
    started = [child for child in psutil.Process().children() if spellers.__name__ in command_line(child)]
    assert len(started) == 2
    jobs = {f"{n}/1": f"I have {n} cats." for n in range(8)}
    stage.send(*(synthesize(stage, job, prompt(noise(1)), text) for job, text in jobs.items()))
    got = {message.job: message.text_ids for message in (stage.next(stage.llm) for _ in jobs)}
    frontend = Frontend(CHECKPOINT, load_config(CHECKPOINT))
    assert got == {job: frontend.split_text(text)[0] for job, text in jobs.items()}
    stage.stop()
    assert not any(child.is_running() for child in started)
    stage.start()


@pytest.mark.parametrize("at_once", [50, 2])
def test_short_texts_pass_long_ones_that_cost_much(make_stage, at_once):
    """Also if more long texts wait than may be processed at once."""
    stage = make_stage(encode_paral_num=at_once)
    voice = prompt(noise(1))
    stage.send(synthesize(stage, "first/1", voice, "I have 3 cats."))
    assert stage.next(stage.llm).job == "first/1"
    stage.send(*(synthesize(stage, f"long{n}/1", voice, "1," * 1000 + str(n)) for n in range(10)))
    stage.send(*(synthesize(stage, f"short{n}/1", voice, f"I have {n} dogs.") for n in range(4)))
    assert {stage.next(stage.llm).job for _ in range(4)} == {f"short{n}/1" for n in range(4)}
    stage.send(*(m.Abort(job=f"long{n}/1") for n in range(10)))
    assert stage.is_silent(stage.llm)
    stage.send(synthesize(stage, "last/1", voice, "1," * 300))
    assert stage.next(stage.llm).job == "last/1", "the work for aborted texts goes on"


def test_parts_come_in_order_and_finished_ones_are_left_out(make_stage):
    stage = make_stage()
    text = "The quick brown fox jumps over the lazy dog. " * 9
    stage.send(synthesize(stage, "a/1", prompt(noise(1)), text))
    first = stage.next(stage.llm)
    parts = [first] + [stage.next(stage.llm) for _ in range(first.parts - 1)]
    assert first.parts == 2 and [part.part for part in parts] == [0, 1]
    done, under_way = m.PartProgress(tokens=[1], finished=True), m.PartProgress(tokens=[7, 8], samples=960)
    stage.send(synthesize(stage, "a/2", prompt(noise(1)), text, progress=[done, under_way]))
    again = stage.next(stage.llm)
    assert (again.job, again.part, again.parts) == ("a/2", 1, 2)
    assert again.progress == under_way and again.text_ids == parts[1].text_ids
    assert stage.is_silent(stage.llm)


@pytest.mark.parametrize(
    ("text", "llm_hears_prompt"),
    [("Good morning.", True), ("", False), ("Speak softly.<|endofprompt|>", False)],
)
def test_the_llm_gets_what_the_mode_says_and_the_flow_always_the_prompt(make_stage, text, llm_hears_prompt):
    stage = make_stage()
    stage.send(synthesize(stage, "a/1", prompt(noise(1), text)))
    generate = stage.next(stage.llm)
    assert bool(len(generate.prompt_speech_token.array(np.int32))) == llm_hears_prompt
    assert bool(generate.prompt_text_ids) == bool(text)
    assert generate.flow_prompt_tokens == len(attach(generate.prompt.segment).speech_token) == 25


MARK = "<|endofprompt|>"
SYSTEM = "You are a helpful assistant."


@pytest.mark.parametrize(
    ("prompt_text", "text", "leading", "llm_hears_prompt"),
    [
        ("", "Hello.", SYSTEM, False),
        ("", f"{SYSTEM}{MARK}Hello.", SYSTEM, False),
        ("", f"Speak softly.{MARK}Hello.", f"{SYSTEM} Speak softly.", False),
        (f"Speak softly.{MARK}", "Hello.", f"{SYSTEM} Speak softly.", False),
        ("Good morning.", "Hello.", SYSTEM, True),
        (f"{SYSTEM}{MARK}Good morning.", "Hello.", SYSTEM, True),
        ("Good morning.", f"{SYSTEM}{MARK}Hello.", SYSTEM, True),
    ],
)
def test_every_prompt_of_cosyvoice3_has_leading_ids(make_stage, prompt_text, text, leading, llm_hears_prompt):
    stage = make_stage(model_dir=CHECKPOINT3)
    encode = TextTokenizer(CHECKPOINT3, COSYVOICE3_INPUTS.special_tokens).encode
    stage.send(synthesize(stage, "a/1", prompt(noise(1), prompt_text), text, report=True))
    generate = stage.next(stage.llm)
    assert generate.prompt_text_ids[: generate.leading_ids] == encode(leading + MARK)
    transcript = generate.prompt_text_ids[generate.leading_ids :]
    assert transcript == (encode("Good morning.") if llm_hears_prompt else [])
    assert bool(len(generate.prompt_speech_token.array(np.int32))) == llm_hears_prompt
    assert generate.text_ids == encode("Hello.")
    assert stage.next(stage.worker) == m.Encoded(job="a/1", text_tokens=len(generate.text_ids))


def test_an_instruction_in_the_wrong_place_of_cosyvoice3_fails(make_stage):
    stage = make_stage(model_dir=CHECKPOINT3)
    stage.send(synthesize(stage, "a/1", prompt(noise(1), f"Softly.{MARK}"), f"{SYSTEM}{MARK}Hello."))
    stage.send(synthesize(stage, "b/1", prompt(noise(1)), f"{SYSTEM}{MARK}..."))
    stage.send(synthesize(stage, "c/1", prompt(noise(1)), "", bistream=True))
    stage.send(m.AppendText(job="c/1", text=f"Speak softly.{MARK}Hello."), m.FinishText(job="c/1"))
    failed = {message.job: message for message in (stage.failure() for _ in range(3))}
    assert {message.code for message in failed.values()} == {400}
    assert "both" in failed["a/1"].message
    assert "nothing to speak" in failed["b/1"].message
    assert "prompt text" in failed["c/1"].message


def test_a_speaker_of_the_checkpoint_needs_no_recording(make_stage):
    stage = make_stage()
    stage.send(synthesize(stage, "a/1", m.Prompt(speaker="tiny_spk")))
    generate = stage.next(stage.llm)
    assert (generate.flow_prompt_tokens, generate.prompt_text_ids) == (0, [])
    assert attach(generate.prompt.segment).embedding.shape == (192,) and generate.prompt.key


@pytest.mark.parametrize(
    ("voice", "text", "reason"),
    [
        (m.Prompt(speaker="nobody"), "Hello.", "nobody"),
        (m.Prompt(text="x"), "Hello.", "neither"),
        (prompt(noise(30.1)), "Hello.", "longer than 30 s"),
        (prompt(noise(0.1)), "Hello.", "at least"),
        (prompt(noise(1)), "...", "nothing to speak"),
        (prompt(noise(1)), "", "nothing to speak"),
    ],
)
def test_a_request_that_cannot_be_served_fails_alone(make_stage, voice, text, reason):
    stage = make_stage()
    stage.send(synthesize(stage, "bad/1", voice, text), synthesize(stage, "good/1", prompt(noise(1, seed=9))))
    failed = stage.failure()
    assert (failed.job, failed.stage, failed.code, failed.retry) == ("bad/1", "encode", 400, False)
    assert reason in failed.message
    assert stage.next(stage.llm).job == "good/1"


def test_empty_text_leaves_the_prompt_to_the_next_request(make_stage):
    stage, voice = make_stage(), prompt(noise(1))
    stage.send(synthesize(stage, "a/1", voice, "..."), synthesize(stage, "b/1", voice))
    assert stage.next(stage.worker).job == "a/1"
    assert stage.next(stage.llm).job == "b/1"


def test_abort_of_the_first_request_leaves_the_prompt_to_those_that_wait(make_stage):
    stage, voice = make_stage(), prompt(noise(20))
    stage.send(synthesize(stage, "a/1", voice), synthesize(stage, "b/1", voice), m.Abort(job="a/1"))
    assert stage.next(stage.llm).job == "b/1"
    assert stage.is_silent(stage.llm) and stage.is_silent(stage.worker, 0)


def test_one_in_work_at_a_time_keeps_the_order_and_drops_the_aborted(make_stage):
    stage = make_stage(encode_paral_num=1)
    jobs = [f"{n}/1" for n in range(6)]
    stage.send(*(synthesize(stage, job, prompt(noise(2, seed=n))) for n, job in enumerate(jobs)))
    stage.send(m.Abort(job="3/1"))
    assert [stage.next(stage.llm).job for _ in range(5)] == ["0/1", "1/1", "2/1", "4/1", "5/1"]
    assert stage.is_silent(stage.llm)


def test_prompts_stay_while_they_are_used_and_no_longer(make_stage):
    stage = make_stage(cache_capacity=1)
    voices = [prompt(noise(1, seed=n)) for n in range(3)]
    owners = [stage.worker.address, stage.worker.address, "ipc:///gone"]
    for n, voice in enumerate(voices):
        stage.send(synthesize(stage, f"{n}/1", voice, reply_to=owners[n]))
    kept = {stage.next(stage.llm).prompt.segment for _ in voices}
    assert {str(path) for path in stage.segments()} == kept and len(kept) == 3
    stage.send(m.Release(job="0/1"), m.Abort(job="1/1"), m.WorkerGone(address="ipc:///gone"))
    stage.send(synthesize(stage, "again/1", voices[2]))
    assert stage.next(stage.llm).prompt.segment == str(stage.segments()[0])
    assert len(stage.segments()) == 1


def test_a_worker_that_is_gone_gets_no_work_done(make_stage):
    stage = make_stage(encode_paral_num=1)
    stage.send(synthesize(stage, "first/1", prompt(noise(10)), reply_to="ipc:///gone"))
    stage.send(synthesize(stage, "second/1", prompt(noise(1)), reply_to="ipc:///gone"))
    stage.send(m.WorkerGone(address="ipc:///gone"), synthesize(stage, "other/1", prompt(noise(1, seed=1))))
    assert stage.next(stage.llm).job == "other/1"
    stage.send(synthesize(stage, "late/1", prompt(noise(1)), reply_to="ipc:///gone"))  # was under way
    assert stage.is_silent(stage.llm)


def test_bistream_text_stays_in_order_while_features_are_computed(make_stage):
    stage = make_stage()
    pieces = [f"piece {n} " for n in range(10)]
    stage.send(synthesize(stage, "a/1", prompt(noise(20)), "", bistream=True))
    stage.send(*(m.AppendText(job="a/1", text=piece) for piece in pieces[:5]))
    generate = stage.next(stage.llm)
    assert isinstance(generate, m.Generate) and generate.bistream and generate.text_ids == []
    stage.send(*(m.AppendText(job="a/1", text=piece) for piece in pieces[5:]), m.FinishText(job="a/1"))
    ids = []
    while isinstance(message := stage.next(stage.llm), m.AppendIds):
        ids += message.ids
    assert isinstance(message, m.FinishIds)
    frontend = Frontend(CHECKPOINT, load_config(CHECKPOINT))
    assert ids == frontend.split_text("".join(pieces))[0]


def test_bistream_without_text_fails_and_never_reaches_the_llm(make_stage):
    stage = make_stage()
    stage.send(synthesize(stage, "a/1", prompt(noise(1)), "", bistream=True))
    stage.send(m.AppendText(job="a/1", text=""), m.FinishText(job="a/1"))
    failed = stage.failure()
    assert (failed.job, failed.code) == ("a/1", 400) and "text is empty" in failed.message
    assert stage.is_silent(stage.llm)


@pytest.mark.parametrize("late", [m.AppendText(job="a/1", text="more"), m.FinishText(job="a/1")])
def test_text_after_the_end_fails(make_stage, late):
    stage = make_stage()
    stage.send(synthesize(stage, "a/1", prompt(noise(1)), "", bistream=True))
    stage.send(m.AppendText(job="a/1", text="some text"), m.FinishText(job="a/1"), late)
    failed = stage.failure()
    assert (failed.job, failed.code) == ("a/1", 400)


def test_text_for_a_job_that_takes_none_fails(make_stage):
    stage = make_stage()
    stage.send(synthesize(stage, "a/1", prompt(noise(1))), m.AppendText(job="a/1", text="more"))
    assert stage.next(stage.worker).code == 400


def test_messages_of_unknown_jobs_are_ignored(make_stage):
    stage = make_stage()
    unknown = "unknown/1"
    stage.send(m.AppendText(job=unknown, text="x"), m.FinishText(job=unknown), m.Release(job=unknown))
    stage.send(m.Abort(job=unknown), synthesize(stage, "a/1", prompt(noise(1))))
    assert stage.next(stage.llm).job == "a/1"
    assert stage.is_silent(stage.worker, 0.2)


def test_only_who_asks_is_told_how_many_tokens_a_text_has(make_stage):
    stage = make_stage()
    stage.send(synthesize(stage, "a/1", prompt(noise(1))))
    stage.send(synthesize(stage, "a/2", prompt(noise(1)), report=True))
    spoken = {(message := stage.next(stage.llm)).job: message.text_ids for _ in range(2)}
    assert stage.next(stage.worker) == m.Encoded(job="a/2", text_tokens=len(spoken["a/2"]))
    assert stage.is_silent(stage.worker, 0.2)


def test_a_known_recording_need_not_be_sent_again(make_stage):
    stage, voice = make_stage(cache_capacity=1), prompt(noise(1))
    without = msgspec.structs.replace(voice, audio=None)
    stage.send(synthesize(stage, "a/1", voice))
    segment = stage.next(stage.llm).prompt.segment
    stage.send(synthesize(stage, "a/2", without))
    assert stage.next(stage.llm).prompt.segment == segment
    stage.send(m.Release(job="a/1"), m.Release(job="a/2"), synthesize(stage, "b/1", prompt(noise(2))))
    assert stage.next(stage.llm).job == "b/1"
    stage.send(synthesize(stage, "a/3", without))  # the other voice has taken its place
    failed = stage.failure()
    assert (failed.job, failed.retry) == ("a/3", True)
    stage.send(synthesize(stage, "a/4", voice))
    assert stage.next(stage.llm).job == "a/4"


def test_a_restarted_stage_knows_the_prompts_of_the_one_before(make_stage):
    stage, voice = make_stage(), prompt(noise(1))
    stage.send(synthesize(stage, "a/1", voice))
    segment = stage.next(stage.llm).prompt.segment
    written = Path(segment).stat().st_mtime_ns
    stage.stop()
    stage.start()
    stage.send(synthesize(stage, "a/2", voice))
    assert stage.next(stage.llm).prompt.segment == segment
    assert Path(segment).stat().st_mtime_ns == written
