"""The decode stage over real sockets, on the golden checkpoint: messages in, messages out."""

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.packed_on_cpu import blocks_in_one_kernel, packed_stage

from light_tts.common.prompt_features import PromptFeatures
from light_tts.engine.speech.chunk_planner import Chunk
from light_tts.engine.speech.lanes import SpeechEngine, Task
from light_tts.engine.speech.policy import DeadlinePolicy
from light_tts.engine.speech.work_item import SpeechState, Voice, WorkItem
from light_tts.models.family import load_family
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.padded import PaddedFlow
from light_tts.server.core import messages
from light_tts.server.core.channel import Inbox, Outbox, Peers
from light_tts.server.core.messages import AudioChunk, Failed, PartProgress
from light_tts.server.core.prompt_cache import write_segment
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings, SettingsError
from light_tts.server.core.stage import StageContext
from light_tts.server.tts_decode import manager
from light_tts.tools.parity import Golden
from light_tts.tools.parity.token2wav import load

GOLDEN = Golden(Path("test/golden/cosyvoice2"))
ARRAYS = GOLDEN.arrays("token2wav.npz")
TOKENS: list[int] = ARRAYS["token"].tolist() * 70
FILL = GOLDEN.config.llm.speech_token_size + 2
FEATURES = PromptFeatures(ARRAYS["prompt_token"][0], ARRAYS["prompt_feat"][0], ARRAYS["embedding"].flatten())
PATIENCE = 60.0


class Stage:
    """A decode stage in a thread, and its peers: the LLM (`send`) and an HTTP worker (`receive`)."""

    def __init__(self, folder: Path, golden: Golden = GOLDEN, **settings) -> None:
        self.run_dir = RunDir.create(f"ipc://{folder}/", 1)
        self.run_dir.register_process()  # or a server that starts meanwhile takes it for a dead one's
        self.outbox, self.worker = Outbox(), Inbox(self.run_dir.worker_address())
        self.supervisor = Inbox(self.run_dir.supervisor)
        outbox = Outbox()
        self.ctx = StageContext(
            settings=Settings(model_dir=str(golden.checkpoint), device="cpu", load_trt=False, **settings),
            run_dir=self.run_dir,
            stage="decode",
            index=0,
            incarnation=0,
            inbox=Inbox(self.run_dir.stage_address("decode", 0, 0)),
            outbox=outbox,
            peers=Peers(outbox),
            log=logging.getLogger("light_tts.decode"),
        )
        self.prompt = self.add_prompt("ab", FEATURES)
        self.thread = threading.Thread(target=manager.run, args=(self.ctx,))
        self.thread.start()
        (self.ready,) = self.supervisor.wait(PATIENCE)

    def add_prompt(self, key: str, features: PromptFeatures) -> messages.PromptRef:
        path = self.run_dir.shm / f"prompt-0-{key}.prompt"
        write_segment(path, features)
        return messages.PromptRef(key=key, owner=0, segment=str(path))

    def send(self, message: messages.Message) -> None:
        self.outbox.send(self.ctx.inbox.address, message)

    def open(self, job: str, seed: int = 7, speed: float = 1.0, **fields) -> None:
        given = {
            "reply_to": self.worker.address,
            "part": 0,
            "parts": 1,
            "prompt": self.prompt,
            "speaker": "",
            "options": messages.SpeechOptions(seed=seed, speed=speed),
            "stream": True,
            "progress": PartProgress(),
        }
        self.send(messages.OpenSpeech(job=job, **(given | fields)))

    def tokens(self, job: str, tokens: list[int], final: bool = True, part: int = 0) -> None:
        self.send(messages.SpeechTokens(job=job, part=part, tokens=tokens, final=final))

    def receive(self, *jobs: str) -> dict[str, list[AudioChunk | Failed]]:
        """Return everything received until each of `jobs` has ended."""
        got: dict[str, list] = {job: [] for job in jobs}
        open_jobs, deadline = set(jobs), time.monotonic() + PATIENCE
        while open_jobs:
            assert time.monotonic() < deadline, f"{open_jobs} did not end"
            for message in self.worker.wait(1.0):
                got.setdefault(message.job, []).append(message)
                if isinstance(message, Failed) or (message.final and message.part == message.parts - 1):
                    open_jobs.discard(message.job)
        return got

    def speak(self, job: str, tokens: list[int], **fields) -> list[AudioChunk | Failed]:
        self.open(job, **fields)
        self.tokens(job, tokens)
        return self.receive(job)[job]

    def close(self) -> None:
        self.send(messages.Shutdown())
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        for end in (self.worker, self.supervisor, self.ctx.inbox, self.ctx.outbox, self.outbox):
            end.close()
        self.run_dir.remove()


@pytest.fixture(scope="module", params=["fixed", "grow", "grow_masked"])
def each_schedule(request, tmp_path_factory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("run"), stream_hop=request.param, decode_paral_num=2, n_timesteps=2)
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("run"), decode_paral_num=2, n_timesteps=2)
    yield stage
    stage.close()


def pcm(chunks: list[AudioChunk]) -> np.ndarray:
    """Return the audio of one part, which must be contiguous."""
    samples = np.concatenate([chunk.pcm.array(np.int16) for chunk in chunks])
    starts = np.cumsum([0, *(len(chunk.pcm.array(np.int16)) for chunk in chunks)])
    assert [chunk.start for chunk in chunks] == (starts[:-1] + chunks[0].start).tolist()
    return samples


def test_ready_says_the_sample_rate(stage):
    assert stage.ready.info["sample_rate"] == 24000


@pytest.mark.parametrize("schedule", ["fixed", "grow"])
def test_stream_is_the_golden_one_but_for_the_noise(schedule, socket_path):
    stage = Stage(socket_path, stream_hop=schedule)
    try:
        chunks = stage.speak("golden/0", TOKENS[:120])
    finally:
        stage.close()
    expected = ARRAYS[f"{schedule}_hop_wav"][0]
    assert [token for chunk in chunks for token in chunk.tokens] == TOKENS[:120]
    meta = ARRAYS[f"{schedule}_hop_meta"]
    assert [len(chunk.pcm.array(np.int16)) for chunk in chunks] == meta[:, 3].tolist()
    assert np.abs(pcm(chunks) / 32768 - expected).mean() < 0.02


def test_a_short_first_chunk_is_spoken_alone(each_schedule, socket_path):
    settings = each_schedule.ctx.settings
    other = Stage(socket_path, stream_hop=settings.stream_hop, n_timesteps=settings.n_timesteps, first_hop=8)
    try:
        short, usual = (each.speak("short/0", TOKENS[:120]) for each in (other, each_schedule))
    finally:
        other.close()
    first, second = (len(chunk.pcm.array(np.int16)) for chunk in short[:2])
    assert first == 8 * 960 - 8 * 480
    assert first + second == len(usual[0].pcm.array(np.int16))
    assert [chunk.tokens for chunk in short[2:]] == [chunk.tokens for chunk in usual[1:]]


def test_a_first_chunk_that_is_no_shorter_than_others_is_refused():
    family = load_family(GOLDEN.checkpoint)
    with pytest.raises(SettingsError, match="--first_hop 21: must be at most 20"):
        manager.check_first_hop(family.numbers, 21)


@pytest.mark.parametrize("changes", [{"n_timesteps": 4}, {"n_timesteps": 2, "flow_memory_mb": 0}])
def test_steps_change_the_sound_and_memory_does_not(each_schedule, changes, socket_path):
    other = Stage(socket_path, stream_hop=each_schedule.ctx.settings.stream_hop, **changes)
    try:
        got, usual = (pcm(each.speak("changed/0", TOKENS[:120])) for each in (other, each_schedule))
    finally:
        other.close()
    assert len(got) == len(usual)
    difference = np.abs(got.astype(int) - usual).mean()
    assert difference < 1 if "flow_memory_mb" in changes else difference > 100


def test_the_memory_of_the_packed_flow_changes_nothing_not_even_after_a_death(socket_path, monkeypatch):
    """Nor what another process, which knows nothing of the beginning, goes on with, but for rounding."""
    packed_stage(monkeypatch)
    blocks_in_one_kernel(monkeypatch, rows=4096)
    stages = []
    for name, memory in (("plain", 0), ("first", 64), ("second", 64)):
        (socket_path / name).mkdir()
        stages.append(Stage(socket_path / name, n_timesteps=2, flow_memory_gpu_mb=memory))
    plain, first, second = stages
    try:
        usual = plain.speak("packed/0", TOKENS[:70])
        whole, again = (first.speak(f"packed/{number}", TOKENS[:70]) for number in range(2))
        heard, samples = whole[0].tokens, len(pcm(whole[:1]))
        rest = second.speak("packed/2", TOKENS[:70], progress=PartProgress(tokens=heard, samples=samples))
    finally:
        for each in stages:
            each.close()
    for found, expected in ((whole, usual), (again, usual), (rest, usual[1:])):
        assert [len(pcm([chunk])) for chunk in found] == [len(pcm([chunk])) for chunk in expected]
        assert np.abs(pcm(found).astype(int) - pcm(expected)).mean() < 1


def test_interleaved_jobs_sound_as_alone(each_schedule):
    plans = {f"{number}/0": TOKENS[number : number + length] for number, length in enumerate((70, 31, 90, 5))}
    alone = {job: each_schedule.speak(f"{job}-alone", plan, seed=len(plan)) for job, plan in plans.items()}
    for job, plan in plans.items():
        each_schedule.open(job, seed=len(plan))
    for start in range(0, 100, 9):
        for job, plan in plans.items():
            if start < len(plan):
                each_schedule.tokens(job, plan[start : start + 9], final=start + 9 >= len(plan))
    together = each_schedule.receive(*plans)
    for job in plans:
        assert np.array_equal(pcm(together[job]), pcm(alone[job]))
        assert [chunk.tokens for chunk in together[job]] == [chunk.tokens for chunk in alone[job]]


def check_resumed_at_any_chunk(stage: Stage) -> None:
    tokens = [FILL if index % 16 == 10 else token for index, token in enumerate(TOKENS[:130])]
    whole = stage.speak("whole/0", tokens)
    heard, samples = [], 0
    for count, chunk in enumerate(whole[:-1], start=1):
        heard, samples = heard + chunk.tokens, samples + len(chunk.pcm.array(np.int16))
        progress = PartProgress(tokens=heard, samples=samples)
        stage.open(f"whole/{count}", progress=progress)
        stage.tokens(f"whole/{count}", heard, final=False)
        stage.tokens(f"whole/{count}", tokens[len(heard) :])
        rest = stage.receive(f"whole/{count}")[f"whole/{count}"]
        assert rest[0].start == samples
        assert np.array_equal(pcm(rest), pcm(whole[count:]))
        assert [chunk.tokens for chunk in rest] == [chunk.tokens for chunk in whole[count:]]


def test_resumed_at_any_chunk_not_a_sample_differs(each_schedule):
    check_resumed_at_any_chunk(each_schedule)


def test_resumed_with_a_causal_vocoder_not_a_sample_differs(socket_path):
    """Which needs all chunks of the part again."""
    stage = Stage(socket_path, Golden(Path("test/golden/cosyvoice3")), n_timesteps=2)
    try:
        check_resumed_at_any_chunk(stage)
    finally:
        stage.close()


def test_parts_come_in_order_whatever_arrives_first(stage):
    stage.open("parts/0", part=1, parts=3)  # part 0 was finished in an earlier attempt
    stage.open("parts/0", part=2, parts=3)
    stage.tokens("parts/0", TOKENS[:10], part=2)
    stage.tokens("parts/0", TOKENS[:40], part=1)
    chunks = stage.receive("parts/0")["parts/0"]
    assert [(chunk.part, chunk.final) for chunk in chunks] == [(1, False), (1, True), (2, True)]


def test_a_short_answer_does_not_wait_for_all_parts_of_long_ones(stage):
    for part in range(4):
        for number in range(3):
            stage.open(f"long{number}/0", part=part, parts=4, stream=False)
            stage.tokens(f"long{number}/0", TOKENS[:50], part=part)
    stage.open("short/0", stream=False)
    stage.tokens("short/0", TOKENS[:10])
    order: list[str] = []
    deadline = time.monotonic() + PATIENCE
    while len(order) < 13 and time.monotonic() < deadline:
        order += [message.job for message in stage.worker.wait(1.0)]
    assert len(order) == 13
    assert order.index("short/0") < 6


def test_fill_ids_are_not_spoken_but_handed_on(stage):
    filled = [*TOKENS[:5], FILL, *TOKENS[5:9], FILL]
    with_fill = stage.speak("fill/0", filled, stream=False)
    without = stage.speak("plain/0", TOKENS[:9], stream=False)
    assert with_fill[0].tokens == filled
    assert np.array_equal(pcm(with_fill), pcm(without))


def test_speed_changes_the_length_of_an_answer_in_one_piece(stage):
    (chunk,) = stage.speak("fast/0", TOKENS[:20], stream=False, speed=1.25)
    assert len(chunk.pcm.array(np.int16)) == 15360
    (failed,) = stage.speak("fast/1", TOKENS[:20], stream=True, speed=1.25)
    assert failed.code == 400


def test_a_part_without_speech_ends(stage):
    (chunk,) = stage.speak("empty/0", [])
    assert chunk.final and len(chunk.pcm.array(np.int16)) == 0


def test_a_voice_without_a_recording_speaks(stage):
    speaker = stage.add_prompt(
        "cd", PromptFeatures(FEATURES.speech_token[:0], FEATURES.mel[:0], FEATURES.embedding)
    )
    chunks = stage.speak("sft/0", TOKENS[:30], prompt=speaker)
    assert [len(chunk.pcm.array(np.int16)) for chunk in chunks] == [25 * 960 - 3840, 5 * 960 + 3840]


def test_a_prompt_that_has_gone_is_tried_again_elsewhere(stage):
    gone = messages.PromptRef(key="dead", owner=0, segment=f"{stage.run_dir.shm}/gone.prompt")
    (failed,) = stage.speak("gone/0", TOKENS[:9], prompt=gone)
    assert failed.retry


def test_a_prompt_on_the_device_survives_its_segment(stage):
    prompt = stage.add_prompt("ee", FEATURES)
    first = stage.speak("kept/0", TOKENS[:9], prompt=prompt)
    Path(prompt.segment).unlink()
    assert np.array_equal(pcm(stage.speak("kept/1", TOKENS[:9], prompt=prompt)), pcm(first))


def test_an_error_ends_its_own_job_only(stage):
    broken = stage.add_prompt("bad", dataclasses.replace(FEATURES, embedding=np.zeros(3, np.float32)))
    stage.open("broken/0", prompt=broken)
    stage.open("sound/0")
    stage.tokens("broken/0", TOKENS[:40])
    stage.tokens("sound/0", TOKENS[:40])
    got = stage.receive("broken/0", "sound/0")
    assert [message.code for message in got["broken/0"]] == [500]
    assert len(pcm(got["sound/0"])) == 40 * 960


def test_a_part_beyond_the_limit_of_the_flow_says_so(stage):
    (failed,) = stage.speak("long/0", TOKENS[:7403], stream=False)
    assert failed.code == 400 and "7500 speech tokens" in failed.message


def test_aborted_jobs_are_silent(stage):
    stage.send(messages.Abort(job="early/0"))  # overtakes the job
    stage.open("early/0")
    stage.tokens("early/0", TOKENS[:60])
    stage.open("late/0")
    stage.tokens("late/0", TOKENS[:120])
    stage.send(messages.Abort(job="late/0"))
    stage.tokens("late/0", TOKENS[:120])
    got = stage.speak("other/0", TOKENS[:60])
    assert len(pcm(got)) == 60 * 960
    assert not [message for message in stage.worker.wait(0) if message.job in ("early/0", "late/0")]


def test_jobs_of_a_dead_worker_are_dropped(stage):
    dead = Inbox(stage.run_dir.worker_address())
    stage.open("orphan/0", reply_to=dead.address)
    stage.send(messages.WorkerGone(address=dead.address))
    stage.open("orphan/1", reply_to=dead.address)  # was under way
    for job in ("orphan/0", "orphan/1"):
        stage.tokens(job, TOKENS[:60])
    stage.speak("alive/0", TOKENS[:9])
    assert not dead.wait(0.2)
    dead.close()


def test_tokens_of_unknown_jobs_are_ignored(stage):
    stage.tokens("never opened/0", TOKENS[:60])
    stage.open("opened/0")
    stage.tokens("opened/0", TOKENS[:9], part=3)
    (failed,) = stage.receive("opened/0")["opened/0"]
    assert failed.code == 500 and "part 3" in failed.message


# ---------------------------------------------------------------- first chunks, as on a GPU


class RecordedLock:
    """In place of the first-chunk lock: what was wanted, each change."""

    def __init__(self) -> None:
        self.changes = [False]

    def keep(self, wanted: bool) -> None:
        if wanted != self.changes[-1]:
            self.changes.append(wanted)


@pytest.fixture
def kept(monkeypatch) -> RecordedLock:
    kept = RecordedLock()
    monkeypatch.setattr(manager, "choose_first_chunk_lock", lambda directory, device: kept)
    return kept


@pytest.fixture
def yielding(kept, socket_path) -> Iterator[Stage]:
    stage = Stage(socket_path, decode_paral_num=2, n_timesteps=2)
    yield stage
    stage.close()


def test_the_first_chunk_lock_is_kept_from_the_tokens_of_a_first_chunk_to_its_samples(yielding, kept):
    yielding.open("a/0")
    yielding.tokens("a/0", TOKENS[:20], final=False)  # not enough
    yielding.speak("whole/0", TOKENS[:60], stream=False)
    assert kept.changes == [False]
    yielding.tokens("a/0", TOKENS[20:90])
    assert len(yielding.receive("a/0")["a/0"]) > 2
    assert kept.changes == [False, True, False]
    heard = PartProgress(tokens=TOKENS[:27], samples=27 * 960 - 3840)
    yielding.speak("resumed/1", TOKENS[:90], progress=heard)
    assert kept.changes == [False, True, False]


def test_the_first_chunk_lock_is_given_back_when_a_first_chunk_fails_or_is_aborted(yielding, kept):
    broken = yielding.add_prompt("bad", dataclasses.replace(FEATURES, embedding=np.zeros(3, np.float32)))
    yielding.speak("broken/0", TOKENS[:40], prompt=broken)
    yielding.open("gone/0")
    yielding.tokens("gone/0", TOKENS[:40])
    yielding.send(messages.Abort(job="gone/0"))
    yielding.speak("whole/0", TOKENS[:9], stream=False)
    assert kept.changes[-1] is False


def test_what_waits_for_first_chunks_is_spoken_after_them(yielding):
    jobs = [f"{number}/0" for number in range(8)]
    for number, job in enumerate(jobs):
        yielding.open(job, stream=number % 2 == 0)
        yielding.tokens(job, TOKENS[: 40 + 9 * number])
    got = yielding.receive(*jobs)
    for number, job in enumerate(jobs):
        assert len(pcm(got[job])) == (40 + 9 * number) * 960


@pytest.mark.parametrize(
    ("device", "stream", "coming"), [("cpu", True, 1), ("cuda:1", True, 0), ("cpu", False, 0)]
)
def test_others_gather_while_the_tokens_of_a_first_chunk_are_generated_on_this_gpu(
    yielding, monkeypatch, device, stream, coming
):
    asked: list[int] = []

    def gathers(policy, waiting, coming) -> bool:
        asked.append(coming)
        return coming > 0 and len(asked) < 4

    monkeypatch.setattr(DeadlinePolicy, "gathers", gathers)
    llm = messages.StageInfo("llm", 0, 0, "ipc://nobody", "up", info={"device": device})
    yielding.send(messages.Topology(stages=[llm]))
    yielding.open("new/0", stream=stream)
    assert len(pcm(yielding.speak("whole/0", TOKENS[:9], stream=False))) == 9 * 960
    assert asked == [coming] * (4 if coming else 1)
    yielding.tokens("new/0", TOKENS[:40])
    assert len(pcm(yielding.receive("new/0")["new/0"])) == 40 * 960


# ---------------------------------------------------------------- batches, as on a GPU


@pytest.fixture(scope="module")
def model():
    model = load(GOLDEN, full_last_chunk=False)
    model.flow = PaddedFlow(Flow.from_checkpoint(GOLDEN.checkpoint, GOLDEN.config, torch.device("cpu")))
    return model


def run_batch(model, items: list[WorkItem]) -> list[np.ndarray | Exception]:
    done = queue.SimpleQueue()
    engine = SpeechEngine([model], torch.device("cpu"), max_batch_size=8, wake=lambda: done.put(None))
    (lane,) = engine.free_lanes
    engine.start(lane, [Task(item, owner=None) for item in items])
    assert not engine.free_lanes
    done.get(timeout=PATIENCE)
    (ended,) = engine.ended()
    assert engine.free_lanes == [lane]
    engine.close()
    return ended.outcomes


def items(*lengths: int, features: PromptFeatures = FEATURES) -> list[WorkItem]:
    return [
        WorkItem(
            SpeechState(Voice.of(features, "cpu"), seed=length),
            TOKENS,
            Chunk(0, length, length, True),
            stream=False,
        )
        for length in lengths
    ]


def test_a_padded_batch_sounds_as_its_items_alone(model):
    together = run_batch(model, items(20, 33, 9))
    for length, samples in zip((20, 33, 9), together, strict=True):
        (alone,) = run_batch(model, items(length))
        assert np.abs(samples.astype(int) - alone).max() <= 64


def test_one_bad_item_of_a_batch_fails_alone(model):
    bad = items(12, features=dataclasses.replace(FEATURES, embedding=np.zeros(3, np.float32)))
    outcomes = run_batch(model, [*items(9), *bad, *items(10, 11)])
    assert [isinstance(outcome, Exception) for outcome in outcomes] == [False, True, False, False]
    not_a_number = items(12, features=dataclasses.replace(FEATURES, mel=FEATURES.mel * np.nan))
    outcomes = run_batch(model, [*items(9), *not_a_number])
    assert len(outcomes[0]) == 9 * 960 and isinstance(outcomes[1], ArithmeticError)


def test_a_batch_that_does_not_fit_the_memory_is_halved(model):
    sizes = []

    class SmallMemory:
        def speak(self, batch: list[WorkItem]) -> list[np.ndarray]:
            sizes.append(len(batch))
            if sum(item.chunk.end for item in batch) > 25:
                raise torch.OutOfMemoryError("out of memory")
            return model.speak(batch)

    outcomes = run_batch(SmallMemory(), items(9, 10, 11, 30))
    assert sizes == [4, 2, 2, 1, 1]
    assert [len(outcome) for outcome in outcomes[:3]] == [9 * 960, 10 * 960, 11 * 960]
    assert isinstance(outcomes[3], torch.OutOfMemoryError)
