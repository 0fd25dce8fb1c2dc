"""The LLM stage from outside: messages in, messages out, over real sockets."""

import logging
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support.waiting import eventually

from light_tts.common import cuda_graphs, sampling
from light_tts.common.cuda_graphs import GraphCache, SizedWork
from light_tts.common.sampling_rule import SamplingRule
from light_tts.engine.llm import engine, llm_yield
from light_tts.engine.llm.bistream import Bistream
from light_tts.engine.llm.engine import LLMEngine
from light_tts.engine.llm.pace import RoundPace
from light_tts.engine.llm.runner import TorchRunner
from light_tts.engine.llm.sequence import PartRequest
from light_tts.server.core import messages, settings
from light_tts.server.core.channel import Inbox, Outbox, Peers
from light_tts.server.core.messages import Generate, PartProgress, Raw, SpeechOptions, StageInfo
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings
from light_tts.server.core.stage import StageContext
from light_tts.server.tts_llm import manager, stage
from light_tts.tools.parity import Golden
from light_tts.tools.parity.llm import finish, golden_ids, load_engine, load_model, one_shot

GOLDEN = Golden(Path(__file__).parents[1] / "golden" / "cosyvoice2")
ARRAYS = GOLDEN.arrays("llm.npz")
TEXT = golden_ids(ARRAYS, "text_ids")
PROMPT = golden_ids(ARRAYS, "prompt_speech_token")
SIZE = GOLDEN.config.llm.speech_token_size
RULE = SamplingRule(0.8, 25, 10, 0.1)
SECONDS = 20.0  # timeout for any event


class Receiver:
    """A process that messages are sent to."""

    def __init__(self, address: str) -> None:
        self.inbox = Inbox(address)
        self.address = self.inbox.address
        self.seen: list[messages.Message] = []

    def until(self, condition) -> list[messages.Message]:
        """Return all messages so far, once `condition(messages)` holds."""
        deadline = time.monotonic() + SECONDS
        while not condition(self.seen):
            left = deadline - time.monotonic()
            assert left > 0, f"still waiting; seen {self.seen}"
            self.seen += self.inbox.wait(left)
        return self.seen

    def nothing_for(self, seconds: float) -> bool:
        """Return whether no message arrives in this time."""
        arrived = self.inbox.wait(seconds)
        self.seen += arrived
        return not arrived


class World:
    """An LLM stage in a thread, with receivers as its peers."""

    def __init__(self, decoders: int = 1, **changes) -> None:
        self.run_dir = RunDir.create("ipc:///tmp/", 1)
        options = {"device": "cpu", "disable_log_stats": True, "max_total_token_num": 4096, **changes}
        self.settings = Settings(model_dir=str(GOLDEN.checkpoint), max_req_total_len=2048, **options)
        root = self.run_dir.root
        self.supervisor = Receiver(self.run_dir.supervisor)
        self.worker = Receiver(f"ipc://{root}/worker")
        self.decoders = [Receiver(f"ipc://{root}/decode-{i}") for i in range(decoders)]
        self.outbox = Outbox()
        stages = [
            StageInfo(
                stage="decode",
                index=i,
                incarnation=0,
                address=receiver.address,
                state="up",
                info={"device": "cpu"},
            )
            for i, receiver in enumerate(self.decoders)
        ]
        peers = Peers(self.outbox)
        peers.apply(messages.Topology(stages=stages))
        self.llm = f"ipc://{root}/llm-0"
        self.context = StageContext(
            self.settings, self.run_dir, "llm", 0, 0, Inbox(self.llm), self.outbox, peers, logging.getLogger()
        )
        self.thread = threading.Thread(target=manager.run, args=(self.context,), daemon=True)

    def __enter__(self) -> "World":
        self.thread.start()
        self.supervisor.until(lambda seen: seen)
        return self

    def __exit__(self, *_) -> None:
        self.send(messages.Shutdown())
        self.thread.join(SECONDS)
        alive = self.thread.is_alive()
        self.outbox.close()
        for receiver in (self.supervisor, self.worker, *self.decoders):
            receiver.inbox.close()
        self.context.inbox.close()
        self.run_dir.remove()
        assert not alive

    def send(self, *sent: messages.Message) -> None:
        for message in sent:
            self.outbox.send(self.llm, message)

    def generate(self, job: str, **changes) -> Generate:
        options = {
            "part": 0,
            "parts": 1,
            "prompt_text_ids": [],
            "text_ids": TEXT,
            "prompt_speech_token": Raw.of(np.array(PROMPT, np.int32)),
            "flow_prompt_tokens": len(PROMPT),
            "prompt": None,
            "speaker": "",
            "options": SpeechOptions(seed=42, min_new_tokens=60, max_new_tokens=90),
            "stream": True,
            "bistream": False,
            "progress": PartProgress(),
            **changes,
        }
        return Generate(job=job, reply_to=self.worker.address, **options)


def expected(seed: int = 42, **options) -> list[int]:
    """Return the model's output for the request of `World.generate`."""
    options = {"min_outputs": 60, "max_outputs": 90, "sampling": RULE, **options}
    sequence = one_shot(GOLDEN, TEXT, prompt_speech=PROMPT, **options)
    sequence.seed = seed
    return finish(load_engine(GOLDEN), sequence)


PACES = {"step by step": RoundPace(1, 0), "rounds": RoundPace(8, 1)}


@pytest.fixture(params=PACES)
def pace(request, monkeypatch) -> None:
    """The stage as on a CPU, and as on a GPU."""
    monkeypatch.setattr(manager, "choose_pace", lambda device, round_steps: PACES[request.param])


def speech(seen: list[messages.Message], job: str, part: int = 0) -> list[messages.SpeechTokens]:
    return [m for m in seen if isinstance(m, messages.SpeechTokens) and (m.job, m.part) == (job, part)]


def is_over(job: str, part: int = 0):
    return lambda seen: any(message.final for message in speech(seen, job, part))


def of_type(seen: list[messages.Message], kind: type) -> list:
    return [message for message in seen if isinstance(message, kind)]


def test_tokens_of_a_stream_are_handed_on_when_a_chunk_can_be_made():
    with World() as world:
        world.send(world.generate("a/0"))
        seen = world.decoders[0].until(is_over("a/0"))
        assert isinstance(seen[0], messages.OpenSpeech) and seen[0].options.seed == 42
        sent = speech(seen, "a/0")
        # first chunk: 2 to fill up the prompt of 98, a hop of 25, 3 to look ahead
        assert [len(m.tokens) for m in sent[:-1]] == [30, 25, *[25] * (len(sent) - 3)]
        assert [m.final for m in sent] == [False] * (len(sent) - 1) + [True]
        assert [token for m in sent for token in m.tokens] == expected()
        routed = world.worker.until(lambda seen: seen)
        assert routed == [messages.Routed(job="a/0", decode=0, incarnation=0)]


def test_a_short_first_chunk_is_handed_on_earlier():
    with World(first_hop=8) as world:
        world.send(world.generate("a/0"))
        sent = speech(world.decoders[0].until(is_over("a/0")), "a/0")
        assert [len(m.tokens) for m in sent[:3]] == [11, 19, 25]
        assert [token for m in sent for token in m.tokens] == expected()


def test_without_streaming_tokens_are_handed_on_once(pace):
    with World() as world:
        world.send(world.generate("a/0", stream=False))
        sent = speech(world.decoders[0].until(is_over("a/0")), "a/0")
        assert [(m.tokens, m.final) for m in sent] == [(expected(), True)]


def test_a_resumed_part_begins_with_the_tokens_it_had(pace):
    whole = expected()
    with World() as world:
        for delivered in (27, 52, len(whole)):
            progress = PartProgress(tokens=whole[:delivered], samples=1)
            world.send(world.generate(f"{delivered}/1", progress=progress))
            seen = world.decoders[0].until(is_over(f"{delivered}/1"))
            sent = speech(seen, f"{delivered}/1")
            assert sent[0].tokens[:delivered] == whole[:delivered]
            assert [token for m in sent for token in m.tokens] == whole


def test_many_requests_at_once_say_what_each_says_alone(pace):
    with World(gpt_paral_num=3, max_total_token_num=2048, router_max_wait_tokens=2) as world:
        world.send(
            *(world.generate(f"{i}/0", options=SpeechOptions(seed=i, max_new_tokens=90)) for i in range(8))
        )
        for i in range(8):
            sent = speech(world.decoders[0].until(is_over(f"{i}/0")), f"{i}/0")
            assert [t for m in sent for t in m.tokens] == expected(i, min_outputs=2 * len(TEXT))


def test_parts_are_spoken_in_order_by_one_decode_process_and_finished_ones_are_left_out(pace):
    with World(decoders=2) as world:
        done = PartProgress(finished=True)
        world.send(world.generate("x/0"))
        parts = [done, PartProgress(), PartProgress()]
        world.send(*(world.generate("a/1", part=i, parts=3, progress=p) for i, p in enumerate(parts)))
        seen = world.decoders[1].until(is_over("a/1", 2))
        order = [message.part for message in seen]
        assert order == sorted(order) and set(order) == {1, 2}
        assert len([m for m in seen if isinstance(m, messages.OpenSpeech)]) == 2


def test_decode_processes_take_turns_and_those_down_are_left_out():
    with World(decoders=3) as world:
        world.context.peers.stages["decode", 1] = msgspec.structs.replace(
            world.context.peers.stages["decode", 1], state="down"
        )
        world.send(*(world.generate(f"{i}/0") for i in range(4)))
        routed = of_type(world.worker.until(lambda seen: len(seen) == 4), messages.Routed)
        assert [m.decode for m in routed] == [0, 2, 0, 2]


def test_cuda_graphs_are_recorded_while_there_is_no_job(monkeypatch):
    """With a stand-in for the recording."""
    monkeypatch.setattr(cuda_graphs, "capture", lambda function, pool: (None, None))
    graphs = GraphCache(torch.device("cuda", 0))
    monkeypatch.setattr(TorchRunner, "graphs", graphs)

    def plan(*sizes: str) -> None:
        for size in sizes:
            graphs.plan(size, lambda: SizedWork(lambda: None))

    def wait_until_recorded() -> None:
        assert eventually(lambda: not graphs.unrecorded, SECONDS)

    plan("first", "second", "third")
    with World() as world:
        wait_until_recorded()
        long = SpeechOptions(seed=1, min_new_tokens=1500, max_new_tokens=1500)
        world.send(world.generate("a/0", options=long))
        world.decoders[0].until(lambda seen: len(seen) > 2)
        plan("fourth")
        world.decoders[0].until(lambda seen: len(seen) > 12)
        assert graphs.unrecorded == 1
        world.send(messages.Abort(job="a/0"))
        wait_until_recorded()
        world.send(world.generate("b/0"))
        sent = speech(world.decoders[0].until(is_over("b/0")), "b/0")
        assert [token for m in sent for token in m.tokens] == expected()


def test_without_any_decode_process_a_request_ends_in_503():
    with World() as world:
        world.send(messages.StageGivenUp(stage="decode", index=0, reason="test"), world.generate("a/0"))
        (failed,) = world.worker.until(lambda seen: seen)
        assert (failed.job, failed.code, failed.stage) == ("a/0", 503, "llm")


@pytest.mark.parametrize("changes", [{"text_ids": TEXT * 130}, {"text_ids": []}, {"text_ids": [10**7]}])
def test_a_request_that_cannot_be_served_fails_with_400_and_others_go_on(changes):
    with World() as world:
        world.send(world.generate("bad/0", **changes), world.generate("good/0"))
        world.decoders[0].until(is_over("good/0"))
        (failed,) = of_type(world.worker.until(lambda seen: len(seen) == 2), messages.Failed)
        assert (failed.job, failed.code) == ("bad/0", 400)


def test_an_aborted_job_is_dropped_even_if_the_abort_overtakes_it(pace):
    with World() as world:
        long = SpeechOptions(seed=1, min_new_tokens=1500, max_new_tokens=1500)
        world.send(world.generate("a/0", options=long))
        world.decoders[0].until(lambda seen: len(seen) > 2)
        world.send(messages.Abort(job="a/0"), messages.Abort(job="b/0"), world.generate("b/0"))
        world.send(world.generate("c/0"))
        seen = world.decoders[0].until(is_over("c/0"))
        assert not speech(seen, "b/0") and not any(m.final for m in speech(seen, "a/0"))
        assert world.decoders[0].nothing_for(0.2)
        assert not of_type(world.worker.seen, messages.Failed)


def test_all_jobs_of_a_dead_http_worker_are_dropped(pace):
    with World() as world:
        long = SpeechOptions(seed=1, min_new_tokens=1500, max_new_tokens=1500)
        world.send(*(world.generate(f"{i}/0", options=long) for i in range(3)))
        world.decoders[0].until(lambda seen: len(of_type(seen, messages.OpenSpeech)) == 3)
        world.send(messages.WorkerGone(address=world.worker.address), world.generate("late/0"))
        while not world.decoders[0].nothing_for(0.5):
            pass
        assert not any(is_over(f"{i}/0")(world.decoders[0].seen) for i in range(3))
        assert not speech(world.decoders[0].seen, "late/0")


def test_bistream_speaks_while_text_arrives():
    with World() as world:
        options = SpeechOptions(seed=3, max_new_tokens=80)
        world.send(world.generate("a/0", bistream=True, text_ids=[], options=options))
        assert world.decoders[0].nothing_for(0.2)
        text = golden_ids(ARRAYS, "bi_text_ids") * 2
        world.send(messages.AppendIds(job="a/0", ids=text[:45]))
        world.decoders[0].until(lambda seen: speech(seen, "a/0"))
        world.send(messages.AppendIds(job="a/0", ids=text[45:]), messages.FinishIds(job="a/0"))
        sent = speech(world.decoders[0].until(is_over("a/0")), "a/0")
        tokens = [token for m in sent for token in m.tokens]
        assert set(tokens) <= {*range(SIZE), load_model(GOLDEN).ids.fill}
        assert sum(token < SIZE for token in sent[0].tokens) == 30  # fill ids are no audio


def test_leading_ids_of_a_message_are_not_mixed_with_speech():
    text = golden_ids(ARRAYS, "bi_text_ids")
    with World() as world:
        options = SpeechOptions(seed=3, max_new_tokens=40)
        prompt = {"prompt_text_ids": text[:9], "leading_ids": 4}
        job = world.generate("a/0", bistream=True, text_ids=text[9:], options=options, **prompt)
        world.send(job, messages.FinishIds(job="a/0"))
        sent = speech(world.decoders[0].until(is_over("a/0")), "a/0")
    ids, limit = load_model(GOLDEN).ids, world.settings.max_req_total_len
    rule = {"max_outputs": 40, "sampling": RULE}
    expected = Bistream(PartRequest("", 0, 3, ids, limit, text[:9], PROMPT, leading=4, **rule), mix=(5, 15))
    expected.append_text(text[9:])
    expected.finish_text()
    assert [token for m in sent for token in m.tokens] == finish(load_engine(GOLDEN), expected)


def test_bistream_without_text_fails_with_400():
    with World() as world:
        world.send(world.generate("a/0", bistream=True, text_ids=[]), messages.FinishIds(job="a/0"))
        (failed,) = world.worker.until(lambda seen: seen)
        assert (failed.job, failed.code) == ("a/0", 400)


def test_a_request_that_breaks_a_step_fails_alone(monkeypatch, pace):
    def breaks(scores, rules, history, seeds, parts, steps):
        if (seeds == 13).any():
            raise RuntimeError("unlucky")
        return sampling.draw(scores, rules, history, seeds, parts, steps)

    monkeypatch.setattr(engine, "choose_runner", lambda device: partial(TorchRunner, draw=breaks))
    with World() as world:
        world.send(
            *(world.generate(f"{seed}/0", options=SpeechOptions(seed=seed)) for seed in (11, 12, 13, 14))
        )
        for seed in (11, 12, 14):
            world.decoders[0].until(is_over(f"{seed}/0"))
        (failed,) = of_type(world.worker.until(lambda seen: len(seen) == 5), messages.Failed)
        assert (failed.job, failed.code) == ("13/0", 500)


def test_a_part_that_has_ended_when_its_next_steps_fail_is_spoken_to_its_end(monkeypatch):
    """With rounds begun ahead: the last token is known only after the round behind it has failed."""
    whole = expected(min_outputs=2 * len(TEXT))

    def breaks(scores, rules, history, seeds, parts, steps):
        if (steps > len(whole)).any():  # the end itself is drawn at step len(whole)
            raise RuntimeError("unlucky")
        return sampling.draw(scores, rules, history, seeds, parts, steps)

    monkeypatch.setattr(engine, "choose_runner", lambda device: partial(TorchRunner, draw=breaks))
    monkeypatch.setattr(manager, "choose_pace", lambda device, round_steps: RoundPace(1, 1))
    assert len(whole) < 90
    with World() as world:
        world.send(world.generate("a/0", options=SpeechOptions(seed=42, max_new_tokens=90)))
        sent = speech(world.decoders[0].until(is_over("a/0")), "a/0")
        assert [token for m in sent for token in m.tokens] == whole
        assert not of_type(world.worker.seen, messages.Failed)


class FirstChunk:
    """In place of the first-chunk lock: `there` says whether a decode process has a first chunk."""

    def __init__(self) -> None:
        self.there = False

    def taken(self) -> bool:
        return self.there


@pytest.fixture
def first_chunk(monkeypatch) -> FirstChunk:
    """The stage as on a GPU that decode processes share; steps are held back for as long as it takes."""
    first_chunk = FirstChunk()
    monkeypatch.setattr(manager, "choose_pace", lambda device, round_steps: PACES["rounds"])
    monkeypatch.setattr(manager, "choose_first_chunk_lock", lambda directory, device: first_chunk)
    monkeypatch.setattr(llm_yield, "LONGEST", 1000.0)
    return first_chunk


def test_beside_a_first_chunk_only_streams_that_wait_for_their_own_go_on(first_chunk):
    first_chunk.there = True
    long = {"min_new_tokens": 150, "max_new_tokens": 180}
    with World() as world:
        world.send(world.generate("a/0", options=SpeechOptions(seed=42, **long)))
        world.decoders[0].until(lambda seen: speech(seen, "a/0"))
        world.send(world.generate("whole/0", stream=False, options=SpeechOptions(seed=42, **long)))
        assert world.decoders[0].nothing_for(0.3)
        world.send(world.generate("b/0", options=SpeechOptions(seed=3, **long)))
        world.decoders[0].until(lambda seen: speech(seen, "b/0"))
        assert not any(is_over(job)(world.decoders[0].seen) for job in ("a/0", "b/0", "whole/0"))
        while not world.decoders[0].nothing_for(0.3):
            pass
        first_chunk.there = False
        for job, seed in (("a/0", 42), ("b/0", 3), ("whole/0", 42)):
            sent = speech(world.decoders[0].until(is_over(job)), job)
            assert [token for m in sent for token in m.tokens] == expected(
                seed, min_outputs=150, max_outputs=180
            )


def test_a_first_chunk_that_never_ends_holds_up_nobody_for_long(first_chunk, monkeypatch):
    monkeypatch.setattr(llm_yield, "LONGEST", 0.05)
    first_chunk.there = True
    with World() as world:
        world.send(world.generate("a/0"), world.generate("whole/0", stream=False))
        for job in ("a/0", "whole/0"):
            sent = speech(world.decoders[0].until(is_over(job)), job)
            assert [token for m in sent for token in m.tokens] == expected()


@pytest.mark.parametrize(("device", "rounds"), [("cpu", 4), ("elsewhere", 5)])
def test_a_round_ends_with_a_first_chunks_last_token_and_none_is_begun_before_its_hand_out(
    first_chunk, monkeypatch, device, rounds
):
    """But where another GPU computes it: then the next round is under way as always."""
    steps, awaited, begun_before = [], [], []
    launch, send = LLMEngine.launch, Peers.send

    def launches(engine, work, urgent):
        if work[0][0].on_device:
            steps.append(work[0][1])
            awaited.append(urgent)
        launch(engine, work, urgent)

    def sends(peers, stage, index, message):
        if isinstance(message, messages.SpeechTokens):
            begun_before.append(len(steps))
        send(peers, stage, index, message)

    monkeypatch.setattr(LLMEngine, "launch", launches)
    monkeypatch.setattr(Peers, "send", sends)
    with World() as world:
        info = world.context.peers.stages["decode", 0]
        world.context.peers.stages["decode", 0] = msgspec.structs.replace(info, info={"device": device})
        world.send(world.generate("a/0"))
        world.decoders[0].until(is_over("a/0"))
        assert begun_before[0] == rounds
        assert steps[:4] == [8, 8, 8, 5]  # with the one that the prefill draws, the 30 tokens needed
        assert awaited == [True] * 4 + [False] * (len(steps) - 4)


@pytest.mark.parametrize(("least", "left_out"), [(-3.0, True), (1000.0, False)])
def test_steps_for_first_chunks_leave_out_streams_that_have_enough_audio(
    first_chunk, monkeypatch, least, left_out
):
    monkeypatch.setattr(stage, "ENOUGH_AUDIO", least)
    monkeypatch.setattr(stage, "LONGEST_LEFT_OUT", 1000.0)
    beside: list[set[str]] = []
    launch = LLMEngine.launch

    def launches(engine, work, urgent=False):
        if work[0][0].on_device and urgent:
            beside.append({sequence.job for sequence, _ in work})
        launch(engine, work, urgent)

    long = {"min_new_tokens": 150, "max_new_tokens": 180}
    with World() as world:
        world.send(world.generate("a/0", options=SpeechOptions(seed=42, **long)))
        world.decoders[0].until(lambda seen: speech(seen, "a/0"))
        first_chunk.there = True  # so that nobody else goes on until the next request is there
        while not world.decoders[0].nothing_for(0.3):
            pass
        assert not is_over("a/0")(world.decoders[0].seen)
        monkeypatch.setattr(LLMEngine, "launch", launches)
        world.send(world.generate("whole/0", stream=False, options=SpeechOptions(seed=7, **long)))
        world.send(world.generate("b/0", options=SpeechOptions(seed=3, **long)))
        world.decoders[0].until(lambda seen: speech(seen, "b/0"))
        first_chunk.there = False
        others = {"whole/0"} if left_out else {"a/0", "whole/0"}
        assert {"b/0"} | others in beside
        assert all("b/0" in jobs and jobs <= {"b/0"} | others for jobs in beside)
        for job, seed in (("a/0", 42), ("b/0", 3), ("whole/0", 7)):
            sent = speech(world.decoders[0].until(is_over(job)), job)
            assert [token for m in sent for token in m.tokens] == expected(
                seed, min_outputs=150, max_outputs=180
            )


def test_an_aborted_job_is_dropped_while_its_steps_are_held_back(first_chunk):
    first_chunk.there = True
    with World() as world:
        world.send(world.generate("a/0"))
        world.decoders[0].until(lambda seen: speech(seen, "a/0"))
        world.send(messages.Abort(job="a/0"))
        world.send(world.generate("b/0"))
        world.decoders[0].until(lambda seen: speech(seen, "b/0"))
        first_chunk.there = False
        world.decoders[0].until(is_over("b/0"))
        assert not is_over("a/0")(world.decoders[0].seen)


class Process:
    """The stage as the supervisor starts it."""

    def __init__(self, run_dir: RunDir, model_dir: Path) -> None:
        settings.save(
            Settings(model_dir=str(model_dir), device="cpu", log_dir="", max_req_total_len=2048),
            str(run_dir.settings),
        )
        self.address = run_dir.stage_address("llm", 0, 0)
        info = StageInfo(stage="llm", index=0, incarnation=0, address=self.address, state="starting")
        self.topology = messages.Topology(stages=[info])
        options = {"run_dir": run_dir.root, "stage": "llm", "index": 0, "incarnation": 0}
        options |= {"address": self.address, "supervisor": os.getpid()}
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "light_tts.server.core.stage_main", *flags]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment)


@pytest.fixture
def run_dir():
    run = RunDir.create("ipc:///tmp/", 1)
    yield run
    run.remove()


def test_stage_process_is_ready_works_and_ends(run_dir):
    supervisor = Receiver(run_dir.supervisor)
    outbox, stage = Outbox(), Process(run_dir, GOLDEN.checkpoint)
    outbox.send(stage.address, stage.topology)
    (ready,) = supervisor.until(lambda seen: seen)
    assert isinstance(ready, messages.StageReady)
    outbox.send(stage.address, messages.Shutdown())
    assert stage.process.wait(SECONDS) == 0
    outbox.close()
    supervisor.inbox.close()


def test_stage_process_says_which_file_is_broken(run_dir, tmp_path):
    for path in GOLDEN.checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "llm.pt").unlink()
    (tmp_path / "llm.pt").write_bytes((GOLDEN.checkpoint / "llm.pt").read_bytes()[:5000])
    supervisor = Receiver(run_dir.supervisor)
    outbox, stage = Outbox(), Process(run_dir, tmp_path)
    outbox.send(stage.address, stage.topology)
    (failed,) = supervisor.until(lambda seen: seen)
    assert isinstance(failed, messages.StageStartFailed) and "llm.pt" in failed.reason
    assert stage.process.wait(SECONDS) == 1
    outbox.close()
    supervisor.inbox.close()
