"""Requests that kill the stage processing them: two attempts, then an error; all others are served."""

import asyncio
import resource
import threading
from pathlib import Path

import httpx
import psutil
import pytest
from support.processes import find_below
from support.server_process import PROMPT_TEXT, PROMPT_WAV, start_server
from support.streams import CLIENTS, Client, assert_same_audio, run_clients, stage_pid

from light_tts.server.core.heartbeat import HeartbeatReader
from light_tts.server.httpserver.request import MAX_DEATHS

LONG = 900  # tokens of the request that needs too much memory
ROOM = 24 * 2**20  # bytes beyond what ordinary requests need
ADDRESS_ROOM = 160 * 2**20  # the same of the address space, of which threads reserve more than they use


@pytest.fixture
def server(mortal_server):
    return mortal_server


class Killer(threading.Thread):
    """Kills a process of the stage, as the kernel does when memory is short, whenever `is_due(process, jobs
    in work)`; `killed` counts."""

    def __init__(self, server, stage: str, is_due) -> None:
        super().__init__(daemon=True)
        self.killed = 0
        self._stage, self._is_due = stage, is_due
        self._server = server
        self._known: dict[Path, tuple[psutil.Process, HeartbeatReader]] = {}
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.002):
            for path in Path("/dev/shm").glob(f"light_tts-{self._server.port}-*/heartbeat-{self._stage}-*"):
                try:
                    process, heartbeat = self._known.get(path) or self._find(path)
                    if self._is_due(process, [job.partition("/")[0] for job in heartbeat.in_work()]):
                        process.kill()
                        self.killed += 1
                        psutil.wait_procs([process], timeout=10)
                except (LookupError, OSError, psutil.Error):
                    continue  # it has just ended, or does not run yet

    def _find(self, path: Path) -> tuple[psutil.Process, HeartbeatReader]:
        _, stage, place = path.name.split("-")
        index, incarnation = place.split(".")
        words = ["--stage", stage, "--index", index, "--incarnation", incarnation]
        for process in find_below(self._server.pid, *words):
            self._known[path] = process, HeartbeatReader(path)
            return self._known[path]
        raise LookupError(path)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self.join()


FORM = {"tts_text": "Too much.", "prompt_text": PROMPT_TEXT, "seed": "7"}


async def poison(server, **fields) -> httpx.Response:
    form = {**FORM, **fields}
    async with httpx.AsyncClient(timeout=120) as http:
        files = {"prompt_wav": ("prompt.wav", PROMPT_WAV.read_bytes(), "audio/wav")}
        return await http.post(f"{server.url}/inference_zero_shot", data=form, files=files)


def serve_beside_poison(server, fields: list[dict[str, str]], arm=lambda: True):
    """-> (samples of the clients, the answers to poisonous requests, sent one after another once every client
    has audio and `arm` says so)."""
    answers = []

    async def disturb(clients: list[Client]) -> None:
        while not (all(client.received for client in clients) and arm()):
            await asyncio.sleep(0.002)
        for entry in fields:
            answers.append(await poison(server, **entry))

    return run_clients(server, disturb), answers


class Bystanders:
    """The jobs of the clients: all that are in work until there are as many."""

    def __init__(self) -> None:
        self._jobs: set[str] = set()
        self._complete = False

    def all_known(self) -> bool:
        self._complete = len(self._jobs) >= CLIENTS
        return self._complete

    def have_company(self, jobs: list[str]) -> bool:
        """Return whether there are more jobs than the clients' in progress at once."""
        if not self._complete:
            self._jobs.update(jobs)
        return self._complete and not self._jobs.issuperset(jobs)


def assert_refused(answers: list[httpx.Response], stage: str) -> None:
    for answer in answers:
        assert answer.status_code == 500, answer.text
        assert f"the {stage} stage died again" in answer.json()["message"]


def test_a_request_that_needs_too_much_memory_is_tried_twice(server):
    """Each attempt kills the decode process, which also holds four of the other requests."""
    usual = 0
    clients = Bystanders()

    def measure(process: psutil.Process, jobs: list[str]) -> bool:
        nonlocal usual
        usual = max(usual, process.memory_info().rss)
        return False

    def is_due(process: psutil.Process, jobs: list[str]) -> bool:
        """The others also need more than usual where a survivor takes over all of them: they are spared."""
        return clients.have_company(jobs) and process.memory_info().rss > usual + ROOM

    with Killer(server, "decode", measure):
        undisturbed = run_clients(server)
    with Killer(server, "decode", is_due) as killer:
        tokens = {"min_new_tokens": str(LONG), "max_new_tokens": str(LONG)}
        got, answers = serve_beside_poison(server, [tokens], clients.all_known)
    assert_refused(answers, "decode")
    assert killer.killed == 2
    assert_same_audio(got, undisturbed)


@pytest.mark.nightly
def test_poison_for_the_llm_does_not_use_up_its_restarts(server, undisturbed):
    """Two requests end it four times within a minute; the others, in the same steps, are not to blame."""
    server.wait_until_ready()
    clients = Bystanders()
    with Killer(server, "llm", lambda process, jobs: clients.have_company(jobs)) as killer:
        got, answers = serve_beside_poison(server, [{}, {}], clients.all_known)
    assert_refused(answers, "llm")
    assert killer.killed == 4
    assert_same_audio(got, undisturbed)
    server.wait_until_ready()


def test_poison_for_encode(server, undisturbed):
    server.wait_until_ready()
    text = {"tts_text": "It is 12:45, and 17 of 23 are here. " * 100}
    started = []

    def arm() -> bool:
        started.append(True)
        return True

    with Killer(server, "encode", lambda process, jobs: bool(jobs) and bool(started)) as killer:
        got, answers = serve_beside_poison(server, [text], arm)
    assert_refused(answers, "encode")
    assert killer.killed == 2
    assert_same_audio(got, undisturbed)


@pytest.mark.nightly
def test_a_request_that_brings_audio_before_each_death_is_tried_no_more_than_five_times(server, undisturbed):
    server.wait_until_ready()
    poisonous = Client(server, CLIENTS)
    poisonous.fields |= dict.fromkeys(("min_new_tokens", "max_new_tokens"), "400")
    clients = Bystanders()
    heard = 0  # bytes of it at the last death

    def is_due(process: psutil.Process, jobs: list[str]) -> bool:
        nonlocal heard
        due = clients.have_company(jobs) and len(poisonous.received) > heard
        if due:
            heard = len(poisonous.received)
        return due

    async def disturb(_) -> None:
        while not clients.all_known():
            await asyncio.sleep(0.002)
        with pytest.raises(httpx.RemoteProtocolError):  # cut off: there is no status to send any more
            await poisonous.run()

    with Killer(server, "decode", is_due) as killer:
        got = run_clients(server, disturb)
    assert killer.killed == MAX_DEATHS
    assert 0 < len(poisonous.received) < 400 * 1920
    assert_same_audio(got, undisturbed)
    server.wait_until_ready()


@pytest.mark.nightly
def test_a_limit_of_the_address_space_is_met_twice(undisturbed):
    """RLIMIT_AS, which every decode process inherits: an allocation fails."""
    with start_server(decode_process_num=2, httpserver_workers=2) as server:
        run_clients(server)
        pids = [stage_pid(server, "decode", index) for index in range(2)]
        limit = max(psutil.Process(pid).memory_info().vms for pid in pids) + ADDRESS_ROOM
        for pid in [psutil.Process(pids[0]).ppid(), *pids]:
            resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        tokens = {"min_new_tokens": "3000", "max_new_tokens": "3000"}
        got, answers = serve_beside_poison(server, [tokens])
    assert_refused(answers, "decode")
    assert_same_audio(got, undisturbed)
